"""What a folder of BLIP3-o is: how it is named, sized and finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.blip3o.keys import map_names, map_names_with_target
from clipflow.models.blip3o.published import MODEL_TYPES as PUBLISHED_TYPES
from clipflow.models.blip3o.published import config_from_published
from clipflow.models.blip3o.qwen import materialize_rotary
from clipflow.models.folders.loading import FolderFormat

# Sizes that no tensor has.
NOT_IN_SHAPES = ("text.max_position_embeddings", "vision.image_size", "vision.window_size")


def read_blip3o_config(values: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> BLIP3oConfig:
    """The configuration in a config.json, ours or a published one's (which needs the shapes)."""
    if values.get("model_type") in PUBLISHED_TYPES:
        return config_from_published(values, shapes)
    return BLIP3oConfig.from_dict(values)


def folder_format(*, with_target: bool = False) -> FolderFormat:
    """How folders are read; `with_target` reads the EVA-CLIP tower of a published one, too."""
    return FolderFormat(
        map_names=map_names_with_target if with_target else map_names,
        read_config=read_blip3o_config,
        sizes=sizes,
        finish=materialize_rotary,
    )


def sizes(config: BLIP3oConfig) -> dict[str, object]:
    """The numbers of a configuration that tensors have."""
    parts = dataclasses.asdict(config)
    numbers = {"n_query": config.n_query, "vision.layers": config.vision.depth}
    for part in ("vision", "text", "dit", "target"):
        numbers |= {f"{part}.{name}": value for name, value in (parts[part] or {}).items()}
    return {name: value for name, value in numbers.items() if name not in NOT_IN_SHAPES}
