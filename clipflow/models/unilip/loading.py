"""What a folder of UniLIP is: how it is named, sized and finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from clipflow.models.folders.loading import FolderFormat, refresh_tables
from clipflow.models.unilip.config import UniLIPConfig
from clipflow.models.unilip.image_codec import MODEL_TYPE as TOKENIZER_TYPE
from clipflow.models.unilip.image_codec import TokenizerConfig
from clipflow.models.unilip.keys import map_names
from clipflow.models.unilip.published import MODEL_TYPE as PUBLISHED_TYPE
from clipflow.models.unilip.published import config_from_published

# The decoder is float32 always: a small part of the time, and half precision shows.
WIDE = ("vae_decoder.",)
# Sizes that no tensor has.
NOT_IN_SHAPES = ("text.max_position_embeddings", "vision.image_size")


def read_unilip_config(values: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> UniLIPConfig:
    """The configuration in a config.json, ours or a published one's (which needs the shapes)."""
    if values.get("model_type") == PUBLISHED_TYPE:
        return config_from_published(values, shapes)
    if values.get("model_type") == TOKENIZER_TYPE:
        raise ValueError(
            "load: must be a whole model, got a tokenizer of pictures alone, which "
            "clipflow.UniLIPTokenizer.from_pretrained and `clipflow reconstruct` read"
        )
    return UniLIPConfig.from_dict(values)


def sizes(config: UniLIPConfig | TokenizerConfig) -> dict[str, object]:
    """The numbers of a configuration that tensors have."""
    parts = dataclasses.asdict(config)
    depths = parts["decoder"].pop("layers_per_block")
    numbers = {f"decoder.layers_per_block[{i}]": depth for i, depth in enumerate(depths)}
    scalars = ("n_query", "connect_layer", "text_width")
    numbers |= {name: parts[name] for name in scalars if name in parts}
    for part in ("vision", "text", "dit"):
        numbers |= {f"{part}.{name}": value for name, value in parts.get(part, {}).items()}
    widths = parts["decoder"]["block_out_channels"]
    numbers |= {f"decoder.block_out_channels[{i}]": width for i, width in enumerate(widths)}
    return {name: value for name, value in numbers.items() if name not in NOT_IN_SHAPES}


def materialize_rotary(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Compute the rotary tables of a model that was built on the meta device, in float32."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    refresh_tables(model, (Qwen2RotaryEmbedding,), device)


FORMAT = FolderFormat(
    map_names=map_names,
    read_config=read_unilip_config,
    sizes=sizes,
    finish=materialize_rotary,
    wide=WIDE,
)
