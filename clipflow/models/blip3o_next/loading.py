"""What a folder of BLIP3o-NEXT is: how it is named, sized and finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from clipflow.models.blip3o_next.config import BLIP3oNextConfig
from clipflow.models.blip3o_next.keys import map_names, missing_parts, own_name
from clipflow.models.blip3o_next.published import config_from_published, is_published
from clipflow.models.folders.checkpoint import Weights, open_weights, read_config
from clipflow.models.folders.loading import FolderFormat, refresh_tables

# The decoder is float32 always: a small part of the time, and half precision shows.
WIDE = ("vae.",)
# Parts of a diffusers folder, and the files of one.
DIFFUSERS_PARTS = ("transformer", "vae")
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


def open_next_weights(directory: str | Path) -> Weights:
    """The weights in `directory`, and where it has no SANA those of a local diffusers folder.

    That is the one that config.json names as `diffusion_name_or_path`, from `directory` on or from
    anywhere; nothing is downloaded.

    Raises:
        FileNotFoundError, ValueError: as `open_weights`.
    """
    weights = open_weights(directory)
    if not missing_parts(map(own_name, weights.shapes)):
        return weights
    named = read_config(directory).get("diffusion_name_or_path")
    if not isinstance(named, str) or not named:
        return weights
    folder = Path(directory) / named
    if not folder.is_dir():
        return weights
    files = dict(weights.files)
    found = {own_name(name) for name in files}
    for part in DIFFUSERS_PARTS:
        more = open_weights(
            folder / part,
            weights_file=DIFFUSERS_FILE,
            index_file=f"{DIFFUSERS_FILE}.index.json",
        )
        files |= {n: file for n, file in more.files.items() if own_name(n) not in found}
    return Weights(files)


def read_next_config(values: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> BLIP3oNextConfig:
    """The configuration in a config.json, ours or a published one's (which needs the shapes)."""
    if is_published(values):
        return config_from_published(values, shapes)
    return BLIP3oNextConfig.from_dict(values)


def sizes(config: BLIP3oNextConfig) -> dict[str, object]:
    """The numbers of a configuration that tensors have."""
    parts = dataclasses.asdict(config)
    depths = parts["decoder"]["layers_per_block"]
    widths = parts["decoder"]["block_out_channels"]
    numbers = {f"decoder.layers_per_block[{i}]": depth for i, depth in enumerate(depths)}
    numbers |= {f"decoder.block_out_channels[{i}]": width for i, width in enumerate(widths)}
    for part in ("text", "dit"):
        numbers |= {f"{part}.{name}": value for name, value in parts[part].items()}
    del numbers["text.max_position_embeddings"]  # no tensor has it
    return numbers


def materialize_rotary(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Compute the rotary table of a model that was built on the meta device, in float32."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    refresh_tables(model, (Qwen3RotaryEmbedding,), device)


FORMAT = FolderFormat(
    map_names=map_names,
    read_config=read_next_config,
    sizes=sizes,
    finish=materialize_rotary,
    wide=WIDE,
    open_weights=open_next_weights,
)
