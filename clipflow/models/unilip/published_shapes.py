"""Sizes of a published UniLIP, read from the names and shapes of its tensors.

Only what shapes cannot say comes from elsewhere: how widths are split into heads are tables (specs
section 6).
"""

from __future__ import annotations

import math

from clipflow.models.dits.sana import SanaConfig
from clipflow.models.folders.shapes import Shapes
from clipflow.models.unilip.config import DecoderConfig, VisionConfig

# Width of the DiT -> (heads of self-attention, heads of cross-attention); 64 is a size for tests.
DIT_HEADS = {1152: (36, 16), 2240: (70, 20), 64: (4, 2)}
# Width of the vision tower -> its heads.
VISION_HEADS = {1024: 16, 64: 4}
DIT = "dit."
DECODER = "vae_decoder.decoder."


def dit_config(shapes: Shapes, side: int, interpolation_scale: float) -> SanaConfig:
    """The DiT's; `side` is that of the latent grid.

    `interpolation_scale` 0 leaves the position table out (`config_from_published` says why not to).
    """
    width = shapes.of(f"{DIT}scale_shift_table", 2)[1]
    if width not in DIT_HEADS:
        raise ValueError(
            f"published UniLIP: the DiT must be one of {sorted(DIT_HEADS)} wide, as shapes do not "
            f"tell its heads, got {width}"
        )
    self_heads, cross_heads = DIT_HEADS[width]
    *_, patch, _ = shapes.of(f"{DIT}patch_embed.proj.weight", 4)
    if patch != 1:
        raise ValueError(f"published UniLIP: the DiT's patches must be of 1 cell, got {patch}")
    return SanaConfig(
        in_channels=shapes.of(f"{DIT}patch_embed.proj.weight", 4)[1],
        out_channels=shapes.of(f"{DIT}proj_out.weight", 2)[0],
        num_layers=shapes.count(f"{DIT}transformer_blocks"),
        num_attention_heads=self_heads,
        attention_head_dim=width // self_heads,
        num_cross_attention_heads=cross_heads,
        cross_attention_head_dim=width // cross_heads,
        caption_channels=shapes.of(f"{DIT}caption_projection.linear_1.weight", 2)[1],
        mlp_ratio=shapes.of(f"{DIT}transformer_blocks.0.ff.conv_point.weight", 4)[1] / width,
        sample_size=side,
        norm_eps=1e-6,
        position_table=interpolation_scale > 0,
        interpolation_scale=interpolation_scale or 1.0,
    )


def vision_config(
    shapes: Shapes, *, heads: int | None = None, layer_norm_eps: float = 1e-6
) -> VisionConfig:
    """The vision tower's; `heads` are those of the table when not given."""
    tower = "vision_tower.encoder.layers"
    image, patch, shuffle = image_sides(shapes)
    width = shapes.of("vision_tower.embeddings.patch_embedding.weight", 4)[0]
    heads = VISION_HEADS.get(width) if heads is None else heads
    if heads is None:
        raise ValueError(
            f"published UniLIP: the vision tower must be one of {sorted(VISION_HEADS)} wide, as "
            f"shapes do not tell its heads, got {width}"
        )
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=shapes.count(tower),
        num_attention_heads=heads,
        intermediate_size=shapes.of(f"{tower}.0.mlp.fc1.weight", 2)[0],
        image_size=image,
        patch_size=patch,
        shuffle=shuffle,
        layer_norm_eps=layer_norm_eps,
    )


def decoder_config(shapes: Shapes) -> DecoderConfig:
    """The pixel decoder's; a stage is named by its number, 0 has the largest pictures."""
    blocks = f"{DECODER}up_blocks"
    last = shapes.count(blocks) - 1
    types, depths, scales, head_dims = [], [], [], {32}
    for i in range(last + 1):
        first = 0 if i == last else 1  # a convolution that doubles the side comes before
        stage = f"{blocks}.{i}"
        depths.append(shapes.count(stage) - first)
        attends = f"{stage}.{first}.attn.to_q.weight" in shapes
        types.append("EfficientViTBlock" if attends else "ResBlock")
        scales.append(())
        inner = f"{stage}.{first}.attn.to_qkv_multiscale"
        if f"{inner}.0.proj_in.weight" in shapes:
            count = shapes.count(inner)
            scales[-1] = tuple(shapes.of(f"{inner}.{j}.proj_in.weight", 4)[3] for j in range(count))
            head_dims = {shapes.of(f"{inner}.{j}.proj_out.weight", 4)[1] for j in range(count)}
    channels = [shapes.of(f"{blocks}.{i}.0.conv.weight", 4)[0] for i in range(last)]
    top = shapes.of(f"{DECODER}conv_in.weight", 4)
    return DecoderConfig(
        latent_channels=top[1],
        attention_head_dim=min(head_dims),
        block_types=tuple(types),
        block_out_channels=(*channels, top[0]),
        layers_per_block=tuple(depths),
        qkv_multiscales=tuple(scales),
    )


def image_sides(shapes: Shapes) -> tuple[int, int, int]:
    """(side of the native picture, side of a patch, patches folded into a feature per axis).

    The pixel shuffle's factor is in the width that the projector reads.
    """
    width, _, patch, _ = shapes.of("vision_tower.embeddings.patch_embedding.weight", 4)
    positions = shapes.of("vision_tower.embeddings.position_embedding", 3)[1]
    folded = shapes.of("multi_modal_projector.0.weight", 1)[0]
    side, shuffle = math.isqrt(positions - 1), math.isqrt(folded // width)
    if side * side != positions - 1 or not side or shuffle * shuffle * width != folded:
        raise ValueError(
            f"published UniLIP: position_embedding must be of a square grid and a class token, and "
            f"the projector read squares of patches, got {positions} positions, {folded} features "
            f"of patches {width} wide"
        )
    return side * patch, patch, shuffle
