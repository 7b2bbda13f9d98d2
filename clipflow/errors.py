"""Every exception clipflow raises, and the argument checks that raise them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shaped = tuple[tuple[int, ...], torch.dtype]
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ShapeError(ValueError):
    """A tensor argument has the wrong shape."""


class InputError(ValueError):
    """Something the user handed in (a file, a prompt, an option) cannot be used; one clear line."""


class SamplingError(RuntimeError):
    """A sampling run went wrong on its way, or a model cannot be planned."""


class NotEnoughMemory(MemoryError):
    """What was asked for does not fit into a device's free memory."""


class AccelerationError(ValueError):
    """A module is not the stock one that `clipflow.accelerate` knows; nothing was changed."""


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot run this call on this machine."""


def check_dims(op: str, name: str, tensor: Tensor, wanted: str) -> None:
    """Raise ShapeError unless `tensor` has as many dimensions as `wanted`, e.g. "[B, L, D]"."""
    if tensor.ndim != wanted.count(",") + 1:
        raise ShapeError(f"{op}: {name} must be {wanted}, got {list(tensor.shape)}")


def check_shape(op: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    """Raise ShapeError unless `tensor` has exactly the shape `wanted`."""
    if tensor.shape != wanted:
        raise ShapeError(f"{op}: {name} must be {list(wanted)}, got {list(tensor.shape)}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` has a dtype that the ops compute in."""
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
        )


def check_result(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise unless `tensor`, an argument `out` or a part of it, can hold its result.

    Raises:
        ShapeError: it has not exactly `shape`.
        TypeError: it is no tensor, or has not exactly `dtype` and `device`.
        ValueError: it is not contiguous.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ShapeError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype is not dtype or tensor.device != device:
        raise TypeError(
            f"{op}: {name} must be {dtype} on {device}, got {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def check_results(
    op: str, out: Sequence[Tensor], wanted: Sequence[Tensor | Shaped | None], device: torch.device
) -> None:
    """`check_result` of each tensor of `out`, `wanted` like a tensor or as (shape, dtype).

    None wants nothing of a tensor that the call leaves alone. Raises ValueError as well unless
    `out` holds as many tensors as are wanted.
    """
    if not isinstance(out, tuple | list) or len(out) != len(wanted):
        found = len(out) if isinstance(out, tuple | list) else type(out).__name__
        raise ValueError(f"{op}: out must be {len(wanted)} tensors, got {found}")
    for i, like in enumerate(wanted):
        if like is None:
            continue
        shape, dtype = (like.shape, like.dtype) if isinstance(like, Tensor) else like
        check_result(op, f"out[{i}]", out[i], shape, dtype, device)


def check_no_gradient(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a gradient would be needed of a call that writes into `out`."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: out has no gradient; call it under torch.no_grad(), or without")


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise TypeError unless `tensor` has the dtype and the device of `like`."""
    if tensor.dtype is not like.dtype or tensor.device != like.device:
        raise TypeError(
            f"{op}: {name} must be {like.dtype} on {like.device} as {like_name} is, "
            f"got {tensor.dtype} on {tensor.device}"
        )
