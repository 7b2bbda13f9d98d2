"""Sizes of a DC-AE decoder, read from the names and shapes of its tensors."""

from __future__ import annotations

from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.folders.shapes import Shapes


def decoder_config(shapes: Shapes, prefix: str) -> DecoderConfig:
    """Of the tensors under `prefix`; a stage is named by its number, 0 has the largest pictures."""
    blocks = f"{prefix}up_blocks"
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
    top = shapes.of(f"{prefix}conv_in.weight", 4)
    return DecoderConfig(
        latent_channels=top[1],
        attention_head_dim=min(head_dims),
        block_types=tuple(types),
        block_out_channels=(*channels, top[0]),
        layers_per_block=tuple(depths),
        qkv_multiscales=tuple(scales),
    )
