"""Every exception clipflow raises, and the argument checks that raise them."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ShapeError(ValueError):
    """A tensor argument has the wrong shape."""


class InputError(ValueError):
    """Something the user handed in (a file, a prompt, an option) cannot be used; one clear line."""


class SamplingError(RuntimeError):
    """A sampling run went wrong on its way, or a model cannot be planned."""


class NotEnoughMemory(MemoryError):
    """What was asked for does not fit into a device's free memory."""


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


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise TypeError unless `tensor` has the dtype and the device of `like`."""
    if tensor.dtype is not like.dtype or tensor.device != like.device:
        raise TypeError(
            f"{op}: {name} must be {like.dtype} on {like.device} as {like_name} is, "
            f"got {tensor.dtype} on {tensor.device}"
        )
