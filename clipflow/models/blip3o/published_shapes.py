"""Sizes of a published BLIP3-o, read from the names and shapes of its tensors."""

from __future__ import annotations

import math

from clipflow.models.dits.lumina import LuminaConfig
from clipflow.models.folders.shapes import Shapes

DIT = "dit."
VISUAL = "visual."


def dit_config(tensors: Shapes) -> LuminaConfig:
    """The DiT's; there is a gate for each of its heads.

    Patches are taken to be of one place, as no tensor says otherwise.
    """
    attention = f"{DIT}layers.0.attn1"
    width, values = tensors.of(f"{DIT}patch_embedder.proj.weight", 2)
    heads = tensors.of(f"{DIT}layers.0.gate", 1)[0]
    keys = tensors.of(f"{attention}.to_k.weight", 2)[0]
    head_dim = width // heads
    if width % heads or not head_dim or keys % head_dim:
        raise ValueError(
            f"published BLIP3-o: the DiT must have whole heads, got {heads} of {width} channels "
            f"and {keys} of keys"
        )
    return LuminaConfig(
        in_channels=values,
        hidden_size=width,
        num_layers=tensors.count(f"{DIT}layers"),
        num_attention_heads=heads,
        num_kv_heads=keys // head_dim,
        intermediate_size=tensors.of(f"{DIT}layers.0.feed_forward.linear_1.weight", 2)[0],
        condition_channels=tensors.of(f"{DIT}caption_projection.linear_1.weight", 2)[1],
        patch_size=1,
        norm_eps=1e-5,
        rope_theta=10000.0,
    )


def vision_sizes(tensors: Shapes) -> dict[str, int]:
    """Those fields of `VisionConfig` that tensors tell."""
    width, _, frames, patch, _ = tensors.of(f"{VISUAL}patch_embed.proj.weight", 5)
    merged = tensors.of(f"{VISUAL}merger.mlp.0.weight", 2)[1]
    merge = math.isqrt(merged // width)
    if merge * merge * width != merged:
        raise ValueError(
            f"published BLIP3-o: {VISUAL}merger must read squares of patches {width} wide, got "
            f"{merged} values"
        )
    return {
        "hidden_size": width,
        "depth": tensors.count(f"{VISUAL}blocks"),
        "intermediate_size": tensors.of(f"{VISUAL}blocks.0.mlp.gate_proj.weight", 2)[0],
        "patch_size": patch,
        "temporal_patch_size": frames,
        "spatial_merge_size": merge,
    }
