"""From a checkpoint folder to a model, with the weights held in memory once; for any family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clipflow.models.folders.checkpoint import (
    Weights,
    check_shapes,
    listed,
    open_weights,
    read_config,
)

M = TypeVar("M", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class FolderFormat:
    """How the folders of one family are read.

    Attributes:
        map_names: names in the files -> {our name: name in the files}, without what is skipped;
            ValueError where they cannot be a model's.
        read_config: (the object in config.json, shapes under our names) -> configuration.
        sizes: configuration -> numbers by name that bound how much is built, so that a senseless
            one is refused before it costs memory; with "layer" in the name those are counted in
            tensors, otherwise in weights.
        finish: (model, device) computes the tables that no checkpoint holds.
        wide: beginnings of our names of what is float32 in every dtype.
        open_weights: opens those of a folder.
    """

    map_names: Callable[[Iterable[str]], dict[str, str]]
    read_config: Callable[[Mapping[str, object], Shapes], Any]
    sizes: Callable[[Any], Mapping[str, object]]
    finish: Callable[[nn.Module, torch.device | str], None]
    wide: tuple[str, ...] = ()
    open_weights: Callable[[str | Path], Weights] = open_weights


def load_model(
    cls: type[M],
    directory: str | Path,
    folder_format: FolderFormat,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> M:
    """Build `cls` without memory for its weights, then give it those in `directory`.

    Weights that are wanted as they are stored are mapped; others are converted, straight to where
    they are wanted, and leave at most 0.13 GB of the file's pages in memory. Each is looked through
    once for values that are not finite, by its least and its greatest.

    Args:
        cls: of the model; takes the configuration.
        directory: config.json and safetensors files.
        folder_format: of the family.
        dtype: of all but the wide weights; of each as stored when not given.
        device: where the weights go.

    Raises:
        FileNotFoundError: no such folder, or no config.json or weights in it.
        ValueError: a damaged file, other keys or shapes than the model's, or a weight that is NaN
            or infinite.
        TypeError: `dtype` is no floating point type.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"load: dtype must be a floating point type, got {dtype}")
    model, weights, names = open_model(cls, directory, folder_format)
    wide = folder_format.wide
    read_weights(model, weights, names, str(directory), dtype=dtype, device=device, wide=wide)
    folder_format.finish(model, device)
    return model.eval()


def open_model(
    cls: type[M], directory: str | Path, folder_format: FolderFormat
) -> tuple[M, Weights, dict[str, str]]:
    """(`cls` on the meta device, its weights, our names -> names in the files).

    Everything is checked but the values of the weights.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    values, weights = read_config(directory), folder_format.open_weights(directory)
    names, shapes = name_weights(weights, folder_format)
    config = folder_format.read_config(values, shapes)
    model = empty_model(cls, config, shapes, str(directory), folder_format.sizes)
    return model, weights, names


def load_config(directory: str | Path, folder_format: FolderFormat) -> Any:
    """The configuration of the model in `directory`; reads config.json and the files' headers.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    values = read_config(directory)
    _, shapes = name_weights(folder_format.open_weights(directory), folder_format)
    return folder_format.read_config(values, shapes)


def empty_model(
    cls: type[M],
    config: Any,
    shapes: Shapes,
    where: str,
    sizes: Callable[[Any], Mapping[str, object]],
) -> M:
    """`cls` on the meta device, for weights of exactly these shapes, under our names.

    Raises:
        ValueError: senseless sizes, or other names or shapes than the model's.
    """
    _check_sizes(sizes(config), shapes)
    try:
        with torch.device("meta"):
            model = cls(config)
    except (RuntimeError, TypeError, ZeroDivisionError, OverflowError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"load: the sizes must fit together: {first}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(wanted, shapes, where)
    return model


def read_weights(
    model: nn.Module,
    weights: Weights,
    names: Mapping[str, str],
    where: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    wide: tuple[str, ...] = (),
) -> None:
    """Give a model on the meta device its weights; `load_model` says how.

    Args:
        model: of `empty_model`.
        weights: of the folder `where`.
        names: our name -> name in the files.
        dtype, device: as of `load_model`.
        wide: beginnings of our names of what is float32 always.

    Raises:
        ValueError: a weight is not finite.
    """
    state, ends = {}, {}
    for own in model.state_dict():
        kept = torch.float32 if own.startswith(wide) else dtype
        state[own] = weights.read(names[own], kept, device)
        ends[own] = torch.stack(torch.aminmax(state[own])).float()
    _check_finite(ends, names, where)
    model.load_state_dict(state, assign=True)


def name_weights(
    weights: Weights, folder_format: FolderFormat
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """(our names -> names in the files, our names -> shapes), without what is skipped.

    Raises:
        ValueError: a name is there twice, or a weight is not float32, bfloat16 or float16.
    """
    names = folder_format.map_names(weights.shapes)
    dtypes = {found: weights.dtypes[found] for found in names.values()}
    wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in DTYPES]
    if wrong:
        raise ValueError("load: weights must be float32, bfloat16 or float16, got " + listed(wrong))
    return names, {own: weights.shapes[found] for own, found in names.items()}


def load_names(
    model: nn.Module, state_dict: Mapping[str, Tensor], folder_format: FolderFormat
) -> None:
    """Copy a state dict with the names of a published checkpoint into `model`, strictly.

    Raises:
        ValueError: other keys or shapes than the model's.
    """
    names = folder_format.map_names(state_dict)
    found = {own: tuple(state_dict[name].shape) for own, name in names.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(wanted, found, "the state dict")
    model.load_state_dict({own: state_dict[name] for own, name in names.items()})


def refresh_tables(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], device: torch.device | str
) -> None:
    """Compute the buffers of modules of `kinds`, made of their `config` alone, in float32.

    They are no part of a checkpoint, so nothing loads them into a model built on the meta device.
    """
    for module in model.modules():
        if isinstance(module, kinds):
            # On the CPU, so that every device gets the same table.
            with torch.device("cpu"):
                fresh = type(module)(module.config)
            for name, table in fresh.named_buffers():
                module.register_buffer(name, table.to(device), persistent=False)


def _check_sizes(numbers: Mapping[str, object], shapes: Shapes) -> None:
    """Refuse more layers than tensors, or a width above the number of all weights."""
    # A few more than there are, so that missing ones can be named.
    weights = sum(math.prod(shape) for shape in shapes.values())
    most = {True: max(len(shapes), 100), False: max(weights, 10**6)}
    for name, value in numbers.items():
        limit = most["layer" in name]
        if type(value) is int and value > limit:
            raise ValueError(f"load: {name} must be at most {limit} for these weights, got {value}")


def _check_finite(extremes: Mapping[str, Tensor], names: Mapping[str, str], where: str) -> None:
    """Refuse weights whose least or greatest value is NaN or infinite; names at most 10."""
    finite = torch.stack(list(extremes.values())).isfinite().all(1).tolist()
    wrong = [names[own] for own, good in zip(extremes, finite, strict=True) if not good]
    if wrong:
        raise ValueError(
            f"load: {where} must hold finite weights of the dtype, got NaN or infinity in "
            + listed(wrong)
        )
