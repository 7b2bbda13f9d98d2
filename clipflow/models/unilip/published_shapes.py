"""Sizes of a published UniLIP, read from the names and shapes of its tensors.

Only what shapes cannot say comes from elsewhere: how widths are split into heads are tables (specs
section 6).
"""

from __future__ import annotations

import math

from clipflow.models.folders.shapes import Shapes
from clipflow.models.unilip.config import VisionConfig

# Width of the vision tower -> its heads.
VISION_HEADS = {1024: 16, 64: 4}


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
