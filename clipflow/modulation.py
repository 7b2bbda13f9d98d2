"""What the norms of diffusion transformers share: checks, the modulation, its gradients.

    gain = weight * (1 + scale + table[1]),   offset = shift + table[0]
    y = norm(x) * gain + offset

Modulation has one row per sample, [B, D], or one per token, in the shape of x. A backend sees both
as S rows [S, D], each for the next rows-of-x / S rows of x: S is B, or the number of tokens.
"""

# Shape suffixes: B = batch, L = tokens, D = channels, S = rows of modulation.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipflow.errors import FLOATING, ShapeError, check_floating, check_like, check_shape

NORMS = ("layer", "rms")


def check_tokens(op: str, x: Tensor, norm: str = "layer") -> None:
    """Raise unless `x` is [B, L, D] or [B, H, W, D], floating, and `norm` is a norm's name."""
    if x.ndim != 3 and x.ndim != 4:
        raise ShapeError(f"{op}: x must be [B, L, D] or [B, H, W, D], got {list(x.shape)}")
    if x.dtype not in FLOATING:
        check_floating(op, "x", x)
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {', '.join(NORMS)}, got {norm!r}")


def check_same(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise unless `tensor` has the shape, dtype and device of `x`."""
    if tensor.shape != x.shape:
        check_shape(op, name, tensor, x.shape)
    if tensor.dtype is not x.dtype or tensor.device != x.device:
        check_like(op, name, tensor, "x", x)


def check_vector(op: str, name: str, vector: Tensor, x: Tensor, rows: tuple[int, ...] = ()) -> None:
    """Raise unless `vector` is [*rows, D] and like `x` in dtype and device."""
    check_shape(op, name, vector, (*rows, x.shape[-1]))
    check_like(op, name, vector, "x", x)


def check_modulation(op: str, x: Tensor, scale: Tensor, **others: Tensor | None) -> None:
    """Raise unless `scale` is [B, D] or in the shape of `x`, and all `others` are as it is."""
    shape, form = x.shape, scale.shape
    if form != shape and form != (shape[0], shape[-1]):
        wanted = f"{[shape[0], shape[-1]]} or {list(shape)}"
        raise ShapeError(f"{op}: scale must be {wanted}, got {list(form)}")
    dtype, device = x.dtype, x.device
    if scale.dtype is not dtype or scale.device != device:
        check_like(op, "scale", scale, "x", x)
    for name, other in others.items():
        if other is not None:
            if other.shape != form:
                check_shape(op, name, other, form)
            if other.dtype is not dtype or other.device != device:
                check_like(op, name, other, "x", x)


def wide(x: Tensor) -> torch.dtype:
    """The dtype that `x` is computed in: float32, or float64 where `x` is."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def modulated_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
    norm: str,
    eps: float,
) -> Tensor:
    """norm(x) * weight * (1 + scale + table[1]) + shift + table[0] in the wide dtype of `x`."""
    dtype, channels = wide(x), x.shape[-1:]
    weight = None if weight is None else weight.to(dtype)
    if norm == "rms":
        normed = F.rms_norm(x.to(dtype), channels, weight, eps)
    else:
        normed = F.layer_norm(x.to(dtype), channels, weight, eps=eps)
    scale = scale.to(dtype)
    shift = None if shift is None else shift.to(dtype)
    if table is not None:
        scale = scale + table[1].to(dtype)
        shift = table[0].to(dtype) if shift is None else shift + table[0].to(dtype)
    y = normed * (1 + per_token(scale, x))
    return y if shift is None else y + per_token(shift, x)


def per_token(modulation: Tensor, x: Tensor) -> Tensor:
    """`modulation` of samples, [B, D], with dimensions to broadcast over the tokens of `x`."""
    if modulation.ndim != 2:
        return modulation
    return modulation[:, None] if x.ndim == 3 else modulation[:, None, None]


def rows(modulation: Tensor | None) -> Tensor | None:
    """`modulation` as [S, D] with contiguous rows; the stride from row to row stays free."""
    if modulation is None:
        return None
    if modulation.ndim != 2:
        modulation = modulation.flatten(0, -2)
    return modulation if modulation.stride(1) == 1 else modulation.contiguous()


def gain(scale: Tensor, weight: Tensor | None, table: Tensor | None) -> Tensor:
    """weight * (1 + scale + table[1]), [S, D], contiguous, in the wide dtype."""
    dtype = wide(scale)
    total = _one_plus(scale, table)
    total = total if weight is None else total * weight.to(dtype)
    return total.contiguous()


def _one_plus(scale: Tensor, table: Tensor | None) -> Tensor:
    total = 1 + scale.flatten(0, -2).to(wide(scale))
    return total if table is None else total + table[1].to(total.dtype)


def modulation_grads(
    d_offset: Tensor,
    d_gain: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of (shift, scale, weight, table) from those of their sums, [S, D] and wide.

    The arguments after `d_gain` are those of the op; of `shift` only whether it is None.
    """
    dtype = scale.dtype
    d_scale = d_gain if weight is None else d_gain * weight.to(d_gain.dtype)
    d_weight = d_table = d_shift = None
    if weight is not None:
        d_weight = (d_gain * _one_plus(scale, table)).sum(0).to(dtype)
    if table is not None:
        d_table = torch.stack([d_offset.sum(0), d_scale.sum(0)]).to(dtype)
    if shift is not None:
        d_shift = d_offset.to(dtype).view(scale.shape)
    return d_shift, d_scale.to(dtype).view(scale.shape), d_weight, d_table
