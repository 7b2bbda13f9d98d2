"""Sizes of a SANA transformer, read from the names and shapes of its tensors."""

from __future__ import annotations

from clipflow.models.dits.sana import QK_NORMS, SanaConfig
from clipflow.models.folders.shapes import Shapes

# Width -> (heads of self-attention, heads of cross-attention); 64 is a size for tests.
DIT_HEADS = {1152: (36, 16), 2240: (70, 20), 64: (4, 2)}


def sana_config(
    shapes: Shapes, prefix: str, *, side: int, interpolation_scale: float
) -> SanaConfig:
    """Of the tensors under `prefix`; how widths are split into heads is a table.

    Args:
        shapes: of a checkpoint.
        prefix: beginning of the transformer's names.
        side: of the latent grid that it was trained on.
        interpolation_scale: of the position table; 0 leaves it out.

    Raises:
        ValueError: a tensor that tells a size is missing, or the transformer is another one.
    """
    width = shapes.of(f"{prefix}scale_shift_table", 2)[1]
    if width not in DIT_HEADS:
        raise ValueError(
            f"published {shapes.family}: the DiT must be one of {sorted(DIT_HEADS)} wide, as "
            f"shapes do not tell its heads, got {width}"
        )
    self_heads, cross_heads = DIT_HEADS[width]
    *_, patch, _ = shapes.of(f"{prefix}patch_embed.proj.weight", 4)
    if patch != 1:
        raise ValueError(
            f"published {shapes.family}: the DiT's patches must be of 1 cell, got {patch}"
        )
    return SanaConfig(
        in_channels=shapes.of(f"{prefix}patch_embed.proj.weight", 4)[1],
        out_channels=shapes.of(f"{prefix}proj_out.weight", 2)[0],
        num_layers=shapes.count(f"{prefix}transformer_blocks"),
        num_attention_heads=self_heads,
        attention_head_dim=width // self_heads,
        num_cross_attention_heads=cross_heads,
        cross_attention_head_dim=width // cross_heads,
        caption_channels=shapes.of(f"{prefix}caption_projection.linear_1.weight", 2)[1],
        mlp_ratio=shapes.of(f"{prefix}transformer_blocks.0.ff.conv_point.weight", 4)[1] / width,
        sample_size=side,
        norm_eps=1e-6,
        position_table=interpolation_scale > 0,
        interpolation_scale=interpolation_scale or 1.0,
        qk_norm=QK_NORMS[f"{prefix}transformer_blocks.0.attn1.norm_q.weight" in shapes],
    )
