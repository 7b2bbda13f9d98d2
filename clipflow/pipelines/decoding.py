"""Options of calls that only some families have: of diffusion decoders, and of image tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipflow.errors import InputError

NULLS = ("sampled", "zero")
MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class FeatureDecoding:
    """Options of a diffusion decoder (BLIP3-o: SDXL on CLIP features).

    Attributes:
        num_inference_steps: of the decoder, each on two rows with guidance.
        guidance_scale: of the decoder; guidance is on above 1.
        null: what guidance steers away from. "sampled" is as the models' authors do: features
            that the model draws of an empty prompt; here with noise of `null_seed`, once for each
            pipeline. "zero" is features of zeros, which need no sampling and depend on no seed.
        null_seed: of the sampled null features.

    Raises:
        InputError: a value is out of range.

    Source: specs of BLIP3-o, section A.8.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    null: str = "sampled"
    null_seed: int = 0

    def __post_init__(self) -> None:
        steps, scale = self.num_inference_steps, self.guidance_scale
        if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
            raise InputError(
                f"decoding: num_inference_steps must be from 1 to {MAX_STEPS}, got {steps!r}"
            )
        if type(scale) not in (int, float) or not math.isfinite(scale) or scale < 0:
            raise InputError(
                f"decoding: guidance_scale must be a number of at least 0, got {scale!r}"
            )
        if self.null not in NULLS:
            raise InputError(f"decoding: null must be one of {', '.join(NULLS)}, got {self.null!r}")
        if type(self.null_seed) is not int or self.null_seed < 0:
            raise InputError(
                f"decoding: null_seed must be a whole number from 0 on, got {self.null_seed!r}"
            )


@dataclass(frozen=True, kw_only=True)
class ImageTokenSampling:
    """How a language model draws image tokens (BLIP3o-NEXT); the defaults are its authors'.

    Attributes:
        temperature, top_p, top_k: as of `CLIPFlowPipeline.chat`; they are checked where tokens are
            drawn.
        allow_any_token: draw from the whole vocabulary, words too, as the authors' code does;
            otherwise from the image tokens alone.

    Source: specs of BLIP3o-NEXT, section B.4.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 1200
    allow_any_token: bool = False
