"""How many parameters each part of a BLIP3-o model has."""

from __future__ import annotations

import torch

from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.blip3o.model import BLIP3oModel
from clipflow.models.folders.parts import count_shapes

# Part -> beginnings of the names of its parameters.
PARTS = {
    "vision tower": ("visual.",),
    "language model": ("language_model.",),
    "lm_head": ("lm_head.",),
    "queries": ("latent_queries",),
    "DiT": ("dit.",),
    "CLIP target": ("clip_target.",),
    "decoder": ("decoder.",),
}


def parameter_counts(model: BLIP3oModel | BLIP3oConfig) -> dict[str, int]:
    """Parameters by part, in the order of PARTS; a tied lm_head counts 0.

    A configuration is built on the meta device, which takes no memory for weights; it has no
    decoder.
    """
    if isinstance(model, BLIP3oConfig):
        with torch.device("meta"):
            model = BLIP3oModel(model)
    return count_shapes({name: p.shape for name, p in model.named_parameters()}, PARTS)
