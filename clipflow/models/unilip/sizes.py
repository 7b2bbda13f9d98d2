"""How many parameters each part of a UniLIP model has."""

from __future__ import annotations

import torch

from clipflow.models.folders.parts import count_shapes
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
    return count_shapes({name: p.shape for name, p in model.named_parameters()}, PARTS)
