"""How many parameters each part of a UniLIP model has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from clipflow.models.unilip.config import UniLIPConfig
from clipflow.models.unilip.model import UniLIPModel

# Part -> beginnings of the names of its parameters.
PARTS = {
    "vision tower": ("vision_tower.",),
    "projector": ("multi_modal_projector.",),
    "language model": ("language_model.",),
    "lm_head": ("lm_head.",),
    "queries": ("latent_queries",),
    "connector": ("llm_connector.", "projector."),
    "DiT": ("dit.",),
    "clip_down": ("vae_decoder.down_blocks.", "vae_decoder.down_mlp."),
    "decoder": ("vae_decoder.decoder.",),
}


def parameter_counts(model: UniLIPModel | UniLIPConfig) -> dict[str, int]:
    """Parameters by part, in the order of PARTS; a tied lm_head counts 0.

    A configuration is built on the meta device, which takes no memory for weights.
    """
    if isinstance(model, UniLIPConfig):
        with torch.device("meta"):
            model = UniLIPModel(model)
    return count_shapes({name: p.shape for name, p in model.named_parameters()})


def count_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The same of our names and shapes, as a checkpoint's headers say them; no others count."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        part = part_of(name)
        if part is not None:
            counts[part] += math.prod(shape)
    return counts


def part_of(name: str) -> str | None:
    """The part of PARTS that the parameter `name`, ours, belongs to; None if to none."""
    return next((part for part, begin in PARTS.items() if name.startswith(begin)), None)
