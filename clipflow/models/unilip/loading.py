"""From a checkpoint folder to a model, with the weights held in memory once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from clipflow.models.unilip.checkpoint import check_shapes, open_weights, read_config
from clipflow.models.unilip.config import UniLIPConfig
from clipflow.models.unilip.image_codec import MODEL_TYPE as TOKENIZER_TYPE
from clipflow.models.unilip.keys import map_names
from clipflow.models.unilip.published import MODEL_TYPE as PUBLISHED_TYPE
from clipflow.models.unilip.published import config_from_published

M = TypeVar("M", bound=nn.Module)


def load_model(
    cls: type[M],
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> M:
    """Build `cls` without memory for its weights, then give it those in `directory`.

    The contract is that of `UniLIPModel.from_pretrained`.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"load: dtype must be a floating point type, got {dtype}")
    values = read_config(directory)
    with open_weights(directory) as weights:
        names = map_names(weights.shapes)
        shapes = {own: weights.shapes[found] for own, found in names.items()}
        config = read_unilip_config(values, shapes)
        with torch.device("meta"):
            model = cls(config)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        check_shapes(wanted, shapes, str(directory))
        state = {own: weights.read(names[own]).to(device, dtype) for own in wanted}
    model.load_state_dict(state, assign=True)
    materialize_rotary(model, device)
    return model.eval()


def load_config(directory: str | Path) -> UniLIPConfig:
    """The configuration of the model in `directory`; reads config.json and the files' headers.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    values = read_config(directory)
    with open_weights(directory) as weights:
        names = map_names(weights.shapes)
        shapes = {own: weights.shapes[found] for own, found in names.items()}
        return read_unilip_config(values, shapes)


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


def load_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a state dict with the reference's names into `model`, strictly.

    Raises:
        ValueError: other keys or shapes than the model's.
    """
    names = map_names(state_dict)
    found = {own: tuple(state_dict[name].shape) for own, name in names.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(wanted, found, "the state dict")
    model.load_state_dict({own: state_dict[name] for own, name in names.items()})


def materialize_rotary(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Compute the rotary tables of a model that was built on the meta device, in float32.

    They are no part of a checkpoint, so nothing loads them.
    """
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    for module in model.modules():
        if isinstance(module, Qwen2RotaryEmbedding):
            # On the CPU, so that every device gets the same table.
            with torch.device("cpu"):
                fresh = Qwen2RotaryEmbedding(module.config)
            for name, table in fresh.named_buffers():
                module.register_buffer(name, table.to(device), persistent=False)
