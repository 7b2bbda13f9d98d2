"""What a pipeline call returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# As the model was published (UniLIP: resized to 448 px), or as decoded (UniLIP: 512 px).
OUTPUT_RESOLUTIONS = ("model", "native")

# Arrays and tensors of several sizes come in a list.
Pictures = list[Image.Image] | np.ndarray | Tensor | list[np.ndarray] | list[Tensor]


@dataclass(frozen=True)
class CLIPFlowPipelineOutput:
    """The pictures of one call.

    Attributes:
        images: a list of PIL images ("pil"), float32 [B, H, W, 3] in [0, 1] ("np"), float32
            [B, 3, H, W] in [0, 1] ("pt"), or the latents as sampled, [B, C, h, w] ("latent").
        skipped_steps: for each picture the numbers of the steps, from 0, that the step cache
            skipped; empty without a step cache.
    """

    images: Pictures
    skipped_steps: tuple[tuple[int, ...], ...] = ()


def in_order(parts: Sequence[Pictures], places: Sequence[Sequence[int]]) -> Pictures:
    """The pictures of several runs as one; picture k of a run belongs at `places[run][k]`."""
    if len(parts) == 1:
        return parts[0]
    found = {
        place: picture
        for part, run in zip(parts, places, strict=True)
        for place, picture in zip(run, part, strict=True)
    }
    pictures = [found[place] for place in sorted(found)]
    first = pictures[0]
    if isinstance(first, Image.Image) or len({picture.shape for picture in pictures}) > 1:
        return pictures
    return torch.stack(pictures) if isinstance(first, Tensor) else np.stack(pictures)
