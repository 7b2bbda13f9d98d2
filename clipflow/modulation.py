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


def check_call(
    op: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    y: Tensor | None = None,
    *,
    norm: str = "layer",
) -> None:
    """Raise unless the tensors fit together and `norm` is a norm's name.

    `x` must be [B, L, D] or [B, H, W, D] and floating, `y` as it is; `scale` [B, D] or in the shape
    of `x`, `shift` and `gate` as it is. Each property is read once: each takes 0.1 us.
    """
    shape, form, dtype, device = x.shape, scale.shape, x.dtype, x.device
    if len(shape) != 3 and len(shape) != 4:
        raise ShapeError(f"{op}: x must be [B, L, D] or [B, H, W, D], got {list(shape)}")
    if dtype not in FLOATING:
        check_floating(op, "x", x)
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if y is not None and (y.shape != shape or y.dtype is not dtype or y.device != device):
        check_shape(op, "y", y, shape)
        check_like(op, "y", y, "x", x)
    if form != (shape[0], shape[-1]) and form != shape:
        wanted = f"{[shape[0], shape[-1]]} or {list(shape)}"
        raise ShapeError(f"{op}: scale must be {wanted}, got {list(form)}")
    if scale.dtype is not dtype or scale.device != device:
        check_like(op, "scale", scale, "x", x)
    if shift is not None and (
        shift.shape != form or shift.dtype is not dtype or shift.device != device
    ):
        check_shape(op, "shift", shift, form)
        check_like(op, "shift", shift, "x", x)
    if gate is not None and (
        gate.shape != form or gate.dtype is not dtype or gate.device != device
    ):
        check_shape(op, "gate", gate, form)
        check_like(op, "gate", gate, "x", x)


def check_vector(op: str, name: str, vector: Tensor, x: Tensor, rows: tuple[int, ...] = ()) -> None:
    """Raise unless `vector` is [*rows, D] and like `x` in dtype and device."""
    check_shape(op, name, vector, (*rows, x.shape[-1]))
    check_like(op, name, vector, "x", x)


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
    if modulation is None or (
        modulation.ndim == 2 and (modulation.is_contiguous() or modulation.stride(1) == 1)
    ):
        return modulation  # is_contiguous is asked first because it takes a third of the time
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
