"""From a checkpoint folder to a model, with the weights held in memory once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from clipflow.models.unilip.checkpoint import (
    Weights,
    check_shapes,
    listed,
    open_weights,
    read_config,
)
from clipflow.models.unilip.config import UniLIPConfig
from clipflow.models.unilip.image_codec import MODEL_TYPE as TOKENIZER_TYPE
from clipflow.models.unilip.image_codec import TokenizerConfig
from clipflow.models.unilip.keys import map_names
from clipflow.models.unilip.published import MODEL_TYPE as PUBLISHED_TYPE
from clipflow.models.unilip.published import config_from_published

M = TypeVar("M", bound=nn.Module)
Config = UniLIPConfig | TokenizerConfig
DECODER = "vae_decoder."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sizes that no tensor has.
NOT_IN_SHAPES = ("text.max_position_embeddings", "vision.image_size")


def load_model(
    cls: type[M],
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> M:
    """Build `cls` without memory for its weights, then give it those in `directory`.

    The contract is that of `UniLIPModel.from_pretrained`. Weights that are wanted as they are
    stored are mapped; others are converted, straight to where they are wanted, and leave at most
    0.13 GB of the file's pages in memory. Each is looked through once for values that are not
    finite, by its least and its greatest.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"load: dtype must be a floating point type, got {dtype}")
    model, weights, names = open_model(cls, directory)
    read_weights(model, weights, names, str(directory), dtype=dtype, device=device)
    materialize_rotary(model, device)
    return model.eval()


def read_weights(
    model: nn.Module,
    weights: Weights,
    names: Mapping[str, str],
    where: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Give a model on the meta device its weights; `load_model` says how.

    Args:
        model: of `empty_model`.
        weights: of the folder `where`.
        names: our name -> name in the files.
        dtype, device: as of `load_model`.

    Raises:
        ValueError: a weight is not finite.
    """
    state, ends = {}, {}
    for own in model.state_dict():
        state[own] = weights.read(names[own], _dtype_of(own, dtype), device)
        ends[own] = torch.stack(torch.aminmax(state[own])).float()
    _check_finite(ends, names, where)
    model.load_state_dict(state, assign=True)


def open_model(cls: type[M], directory: str | Path) -> tuple[M, Weights, dict[str, str]]:
    """(`cls` on the meta device, its weights, our names -> names in the files).

    Everything is checked but the values of the weights.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    values, weights = read_config(directory), open_weights(directory)
    names, shapes = name_weights(weights)
    config = read_unilip_config(values, shapes)
    return empty_model(cls, config, shapes, str(directory)), weights, names


def empty_model(
    cls: type[M], config: Config, shapes: Mapping[str, tuple[int, ...]], where: str
) -> M:
    """`cls` on the meta device, for weights of exactly these shapes, under our names.

    Raises:
        ValueError: senseless sizes, or other names or shapes than the model's.
    """
    check_sizes(config, shapes)
    try:
        with torch.device("meta"):
            model = cls(config)
    except (RuntimeError, TypeError, ZeroDivisionError, OverflowError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"load: the sizes must fit together: {first}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(wanted, shapes, where)
    return model


def load_config(directory: str | Path) -> UniLIPConfig:
    """The configuration of the model in `directory`; reads config.json and the files' headers.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    values, (_, shapes) = read_config(directory), name_weights(open_weights(directory))
    return read_unilip_config(values, shapes)


def name_weights(weights: Weights) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """(our names -> names in the files, our names -> shapes), without what is skipped.

    Raises:
        ValueError: a name is there twice, or a weight is not float32, bfloat16 or float16.
    """
    names = map_names(weights.shapes)
    dtypes = {found: weights.dtypes[found] for found in names.values()}
    wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in DTYPES]
    if wrong:
        raise ValueError("load: weights must be float32, bfloat16 or float16, got " + listed(wrong))
    return names, {own: weights.shapes[found] for own, found in names.items()}


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


def check_sizes(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse sizes that the weights cannot have, before a model of these sizes is built.

    Raises:
        ValueError: more layers than tensors, or a width above the number of all weights.
    """
    # Layers of tensors, other sizes of weights; a few more, so that missing ones can be named.
    weights = sum(math.prod(shape) for shape in shapes.values())
    most = {True: max(len(shapes), 100), False: max(weights, 10**6)}
    parts = dataclasses.asdict(config)
    depths = parts["decoder"].pop("layers_per_block")
    numbers = {f"decoder.layers_per_block[{i}]": depth for i, depth in enumerate(depths)}
    scalars = ("n_query", "connect_layer", "text_width")
    numbers |= {name: parts[name] for name in scalars if name in parts}
    for part in ("vision", "text", "dit"):
        numbers |= {f"{part}.{name}": value for name, value in parts.get(part, {}).items()}
    widths = parts["decoder"]["block_out_channels"]
    numbers |= {f"decoder.block_out_channels[{i}]": width for i, width in enumerate(widths)}
    for name, value in numbers.items():
        limit = most["layer" in name]
        if name not in NOT_IN_SHAPES and type(value) is int and value > limit:
            raise ValueError(f"load: {name} must be at most {limit} for these weights, got {value}")


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


def _dtype_of(own: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The decoder is float32 always: a small part of the time, and half precision shows."""
    return torch.float32 if own.startswith(DECODER) else dtype


def _check_finite(extremes: Mapping[str, Tensor], names: Mapping[str, str], where: str) -> None:
    """Refuse weights whose least or greatest value is NaN or infinite.

    Raises:
        ValueError: names them, at most 10.
    """
    finite = torch.stack(list(extremes.values())).isfinite().all(1).tolist()
    wrong = [names[own] for own, good in zip(extremes, finite, strict=True) if not good]
    if wrong:
        raise ValueError(
            f"load: {where} must hold finite weights of the dtype, got NaN or infinity in "
            + listed(wrong)
        )
