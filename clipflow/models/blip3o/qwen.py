"""Qwen2.5-VL: transformers' modules of our sizes, and patches of pictures.

Source: Bai et al., "Qwen2.5-VL Technical Report" (2025), sections 2.1.1 and 2.1.2.
"""

# Shape suffixes: B = batch, T = positions, C = color channels, P = patch size, M = patches merged
# per axis.

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLVisionRotaryEmbedding,
)

from clipflow.errors import ShapeError
from clipflow.models.blip3o.config import MultimodalTextConfig, VisionConfig
from clipflow.models.folders.loading import refresh_tables

# What computes tables that are no part of a checkpoint.
ROTARY = (Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLVisionRotaryEmbedding)


def make_vision(
    config: VisionConfig, out_hidden_size: int
) -> Qwen2_5_VisionTransformerPretrainedModel:
    """The vision transformer; its features are `out_hidden_size` wide."""
    return Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            depth=config.depth,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_heads,
            patch_size=config.patch_size,
            temporal_patch_size=config.temporal_patch_size,
            spatial_merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            fullatt_block_indexes=list(config.fullatt_block_indexes),
            out_hidden_size=out_hidden_size,
            attn_implementation="sdpa",
        )
    )


def make_language_model(config: MultimodalTextConfig) -> Qwen2_5_VLTextModel:
    """The language model without its head."""
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=_rope_parameters(config),
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )


def patches_of(pixel_values: Tensor, config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, H, W] as what the vision transformer reads; all have one size.

    Returns:
        (patches [B * h * w, 3 * temporal_patch_size * P * P], grid_thw [B, 3] int64:
        1, h = H / P, w = W / P). The patches that are merged into one feature follow each other.

    Raises:
        ShapeError: not RGB, or sides that are no multiples of a feature's pixels.
    """
    step, P, M = config.feature_pixels, config.patch_size, config.spatial_merge_size
    fits = all(side and side % step == 0 for side in pixel_values.shape[2:])
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not fits:
        raise ShapeError(
            f"blip3o: pixel_values must be [B, 3, {step} h, {step} w], got "
            f"{list(pixel_values.shape)}"
        )
    B, C, H, W = pixel_values.shape
    cells = pixel_values.reshape(B, C, H // step, M, P, W // step, M, P)
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)  # [patches, C, P, P]
    frames = cells.unsqueeze(2).expand(-1, -1, config.temporal_patch_size, -1, -1)
    return frames.flatten(1), torch.tensor([[1, H // P, W // P]]).repeat(B, 1)


def plain_positions(attention_mask: Tensor) -> Tensor:
    """0, 1, ... from each row's first real token on, the same on all axes: [3, B, T] int64."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)


def materialize_rotary(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Compute the rotary tables of a model that was built on the meta device, in float32."""
    refresh_tables(model, ROTARY, device)


def _rope_parameters(config: MultimodalTextConfig) -> Mapping[str, object]:
    return {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "mrope_section": list(config.mrope_section),
    }
