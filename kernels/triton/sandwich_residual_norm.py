"""Triton kernels for the sandwich norm; the op is in clipflow/ops/sandwich_residual_norm.py.

    h = x + tanh(gate) * rms(y) * weight
    normed = rms(h) * next_weight * (1 + scale),   h as it is stored

Source: Zhuo et al., "Lumina-Next" (2024), section 2.1, sandwich normalization.

A program holds whole tokens in registers. Bytes moved: forward reads x and y and writes h and
normed, 4 * R*D * itemsize; backward reads d_h, d_normed, h and y and writes d_x and d_y, 6 * R*D *
itemsize, and passes float32 partial sums of the modulation's gradients (about 16 rows of D a
sample) from its first kernel to its second. Nothing is chosen by the batch size and no atomics are
used: a sample's results are the same bits whatever else is in the batch.
"""

import torch
import triton
import triton.language as tl
from clipflow.kernels.triton import _configs, _rows
from clipflow.kernels.triton._rows import group_sum_kernel as group_sum_kernel
from torch import Tensor

# Shape suffixes: R = tokens of all samples, D = channels, B = batch.

# do_not_specialize below names the numbers that change from batch to batch and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.


@triton.jit
def _tanh(x):
    """tanh in float32 within 2 ulp: a minimax polynomial near 0, where 1 - 2 / (..) cancels."""
    z = x * x
    small = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
    small = ((small + 1.33314422036e-1) * z - 3.33332819422e-1) * z * x + x
    return tl.where(tl.abs(x) < 0.625, small, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit(do_not_specialize=["tokens", "group"])
def sandwich_residual_norm_fwd_kernel(
    x_ptr,  # [R, D]
    y_ptr,  # [R, D]
    gate_ptr,  # [B, D]
    scale_ptr,  # [B, D]
    weight_ptr,  # [D] or None
    next_weight_ptr,  # [D] or None
    h_ptr,  # [R, D]
    normed_ptr,  # [R, D]
    tokens,  # R
    group,  # R / B
    channels,  # D
    gate_stride,  # elements between two rows
    scale_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, >= D
):
    # int64: token * channels can pass 2**31.
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    sample = token // group
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < channels)[None, :]
    y = _rows.load_rows(y_ptr, token, channels, d, inside)
    branch, _ = _rows.normalize(y, inside, channels, eps, True)
    if weight_ptr is not None:
        branch *= _rows.load_vector(weight_ptr, d, channels)
    branch *= _tanh(_rows.load_rows(gate_ptr, sample, gate_stride, d, inside))
    h = _rows.load_rows(x_ptr, token, channels, d, inside)
    stored = tl.where(inside, h + branch, 0.0).to(h_ptr.dtype.element_ty)
    at = token[:, None] * channels + d[None, :]
    tl.store(h_ptr + at, stored, mask=inside)
    normed, _ = _rows.normalize(stored.to(tl.float32), inside, channels, eps, True)
    normed = _rows.modulate(
        normed, sample, d, inside, channels, None, scale_ptr, next_weight_ptr, None,
        0, scale_stride, 0,
    )  # fmt: skip
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["partial_size", "group", "chunks"])
def sandwich_residual_norm_bwd_kernel(
    d_h_ptr,  # [R, D]
    d_normed_ptr,  # [R, D]
    h_ptr,  # [R, D]
    y_ptr,  # [R, D]
    gate_ptr,  # [B, D] float32, tanh(gate) * weight
    gain_ptr,  # [B, D] float32
    d_x_ptr,  # [R, D]
    d_y_ptr,  # [R, D]
    partial_ptr,  # [2, B, chunks, D] float32: parts of d_gate, then of d_gain
    partial_size,  # B * chunks * D
    group,  # R / B
    channels,  # D
    chunks,
    eps,
    CHUNK_ROWS: tl.constexpr,  # rows that one program walks, a multiple of BLOCK_ROWS
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first_row = (program % chunks) * CHUNK_ROWS
    d = tl.arange(0, BLOCK_D)

    d_gate = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    d_gain = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for step in range(0, CHUNK_ROWS, BLOCK_ROWS):
        row = first_row + step + tl.arange(0, BLOCK_ROWS)
        inside = (row < group)[:, None] & (d < channels)[None, :]
        token = sample * group + row
        at = token[:, None] * channels + d[None, :]

        h = _rows.load_rows(h_ptr, token, channels, d, inside)
        d_normed = _rows.load_rows(d_normed_ptr, token, channels, d, inside)
        gain = _rows.load_vector(gain_ptr + sample * channels, d, channels)
        normed, rstd = _rows.normalize(h, inside, channels, eps, True)
        # Rows past the end have no mean square: with eps = 0 their rstd is infinite.
        normed = tl.where(inside, normed, 0.0)
        d_gain += d_normed * normed
        d_norm = _rows.norm_gradient(d_normed * gain, normed, rstd, channels, True)
        d_h = _rows.load_rows(d_h_ptr, token, channels, d, inside)
        total = tl.where(inside, d_h + d_norm, 0.0)
        tl.store(d_x_ptr + at, total.to(d_x_ptr.dtype.element_ty), mask=inside)

        y = _rows.load_rows(y_ptr, token, channels, d, inside)
        gate = _rows.load_vector(gate_ptr + sample * channels, d, channels)
        branch, rstd = _rows.normalize(y, inside, channels, eps, True)
        branch = tl.where(inside, branch, 0.0)
        d_gate += total * branch
        d_y = _rows.norm_gradient(total * gate, branch, rstd, channels, True)
        tl.store(d_y_ptr + at, d_y.to(d_y_ptr.dtype.element_ty), mask=inside)

    partial_at = partial_ptr + program * channels + d
    tl.store(partial_at, tl.sum(d_gate, axis=0), mask=d < channels)
    tl.store(partial_at + partial_size, tl.sum(d_gain, axis=0), mask=d < channels)


def forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the normalized, gated branch and normalize the sum.

    Args:
        x: tokens, [..., D], contiguous; float32, bfloat16 or float16.
        y: as `x`.
        gate: [B, D]; any stride between rows, channels contiguous.
        scale: as `gate`.
        weight, next_weight: [D], contiguous.
        eps: added to the mean squares.
        out: (h, normed) to write into, contiguous; h may be `x`, and normed `y`. None for new ones.

    Returns:
        (h, normed) like `x`; computed in float32. Arguments were checked by clipflow.ops.
    """
    h, normed = (torch.empty_like(x), torch.empty_like(x)) if out is None else out
    if x.numel() == 0:
        return h, normed
    D, B = x.shape[-1], scale.shape[0]
    R = x.numel() // D
    rows, block, warps = _configs.tile("sandwich_residual_norm", D, x.get_device())
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        sandwich_residual_norm_fwd_kernel[(triton.cdiv(R, rows),)](
            x, y, gate, scale, weight, next_weight, h, normed, R, R // B, D,
            *_rows.strides(gate, scale), eps,
            BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return h, normed


def backward(
    d_h: Tensor, d_normed: Tensor, h: Tensor, y: Tensor, gate: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h = x + gate * rms(y) and normed = rms(h) * gain.

    Args:
        d_h, d_normed: the outputs' gradients, like `h`, contiguous.
        h: of `forward`, [..., D].
        y: as in `forward`.
        gate: tanh(gate) * weight, [B, D], float32, contiguous.
        gain: next_weight * (1 + scale), as `gate`.
        eps: as in `forward`.

    Returns:
        (d_x, d_y, d_gate, d_gain), the last two [B, D] float32. Sums are taken in a fixed order, so
        two calls give the same bits.
    """
    d_x, d_y = torch.empty_like(h), torch.empty_like(h)
    if h.numel() == 0:
        return d_x, d_y, torch.zeros_like(gain), torch.zeros_like(gain)
    D, B = h.shape[-1], gain.shape[0]
    group = h.numel() // D // B
    rows, block, warps = _configs.tile("sandwich_residual_norm_backward", D, h.get_device())
    chunk_rows, chunks = _rows.chunks_of(group, rows)
    partial = torch.empty(2, B, chunks, D, dtype=torch.float32, device=h.device)
    with torch.cuda.device(h.get_device()):  # the CPU's -1, in the interpreter, does nothing
        sandwich_residual_norm_bwd_kernel[(B * chunks,)](
            d_h, d_normed, h, y, gate, gain, d_x, d_y, partial, B * chunks * D, group, D, chunks,
            eps, CHUNK_ROWS=chunk_rows, BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
        d_gate, d_gain = _rows.group_sums(partial).unbind(0)
    return d_x, d_y, d_gate, d_gain
