"""Published EVA-CLIP towers, in a folder of their own or inside a BLIP3-o: names, sizes, loading.

Source: specs of BLIP3-o, sections A.6 and A.10.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from clipflow.models.blip3o.eva import EVAConfig, EVATower
from clipflow.models.folders.checkpoint import open_weights
from clipflow.models.folders.loading import FolderFormat, empty_model, name_weights, read_weights
from clipflow.models.folders.shapes import Shapes

# What a tower's names begin with in files. Where "visual." is Qwen2.5-VL's vision, it has no class
# token.
PREFIXES = (
    "model.gen_vision_tower.vision_tower.model.",
    "gen_vision_tower.vision_tower.model.",
    "visual.",
    "",
)
# Beginnings of a tower's own names. Files hold more: a text tower, a last norm, a head.
OWN = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.")
# Width of the tower -> its heads: EVA-CLIP-E's, and a size for tests.
HEADS = {1792: 16, 32: 2}


def eva_names(names: Iterable[str]) -> dict[str, str]:
    """Name in an `EVATower` -> name in the file, of a tower's names among others; {} without one.

    The first prefix of `PREFIXES` under which there is a class token is the tower's.
    """
    names = set(names)
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}cls_token" in names), None)
    if prefix is None:
        return {}
    under = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return {own: name for own, name in sorted(under.items()) if own.startswith(OWN)}


def eva_config(shapes: Mapping[str, tuple[int, ...]], *, pool: int = 4) -> EVAConfig:
    """The sizes of a tower with tensors of these shapes, under its own names.

    Args:
        shapes: by name.
        pool: of `EVAConfig`; no tensor says it.

    Raises:
        ValueError: a tensor that tells a size is missing, or the heads of this width are unknown.
    """
    tensors = Shapes(shapes, "EVA tower")
    width, _, patch_size, _ = tensors.of("patch_embed.proj.weight", 4)
    if width not in HEADS:
        raise ValueError(f"eva tower: width must be one of {sorted(HEADS)}, got {width}")
    return EVAConfig(
        image_size=patch_size * math.isqrt(tensors.of("pos_embed", 3)[1] - 1),
        patch_size=patch_size,
        hidden_size=width,
        num_hidden_layers=tensors.count("blocks"),
        num_attention_heads=HEADS[width],
        intermediate_size=tensors.of("blocks.0.mlp.fc1.weight", 2)[0],
        pool=pool,
    )


def load_eva(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    pool: int = 4,
) -> EVATower:
    """The tower in a folder of safetensors files, in evaluation mode, among whatever they hold.

    Args:
        directory: of a tower, or of a BLIP3-o that was saved with it. No config.json is asked for.
        dtype: of the weights; as stored when not given.
        device: of the weights.
        pool: of `EVAConfig`.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: a damaged file, no tower, other shapes, or a weight that is not finite.
    """
    weights = open_weights(directory)
    names, shapes = name_weights(weights, _FORMAT)
    if not names:
        raise ValueError(f"load: {directory} must hold an EVA-CLIP tower, got no cls_token")
    config = eva_config(shapes, pool=pool)
    tower = empty_model(EVATower, config, shapes, str(directory), EVAConfig.to_dict)
    read_weights(tower, weights, names, str(directory), dtype=dtype, device=device)
    return tower.eval()


_FORMAT = FolderFormat(
    map_names=eva_names,
    read_config=lambda values, shapes: eva_config(shapes),
    sizes=EVAConfig.to_dict,
    finish=lambda model, device: None,
)
