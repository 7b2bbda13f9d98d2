"""What a folder of BLIP3-o is: how it is named, sized and finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.blip3o.qwen import materialize_rotary
from clipflow.models.folders.loading import FolderFormat

# Sizes that no tensor has.
NOT_IN_SHAPES = ("text.max_position_embeddings", "vision.image_size", "vision.window_size")


def folder_format(*, with_target: bool = False) -> FolderFormat:
    """How folders are read; `with_target` reads the EVA-CLIP tower of a published one, too."""
    return FolderFormat(
        map_names=_same_names,
        read_config=_read_config,
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


def _same_names(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _read_config(values: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> BLIP3oConfig:
    return BLIP3oConfig.from_dict(values)
