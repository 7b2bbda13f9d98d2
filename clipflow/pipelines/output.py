"""What a pipeline call returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Pictures = list[Image.Image] | np.ndarray | Tensor


@dataclass(frozen=True)
class CLIPFlowPipelineOutput:
    """The pictures of one call.

    Attributes:
        images: a list of PIL images ("pil"), float32 [B, H, W, 3] in [0, 1] ("np"), float32
            [B, 3, H, W] in [0, 1] ("pt"), or the latents as sampled, [B, C, h, w] ("latent").
    """

    images: Pictures
