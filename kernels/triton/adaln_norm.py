"""Triton kernels for adaptive layer norm; the op is defined in clipflow/ops/adaln_norm.py.

    y = norm(x) * weight * (1 + scale + table[1]) + shift + table[0]

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN.

A program holds whole tokens in registers. Bytes moved: forward reads x and writes y, 2 * R*D *
itemsize; backward reads grad and x and writes d_x, 3 * R*D * itemsize, and passes float32 partial
sums of the modulation's gradients (about 16 rows of D a sample) from its first kernel to its
second. Nothing is chosen by the batch size and no atomics are used: a sample's results are the same
bits whatever else is in the batch.
"""

import torch
import triton
import triton.language as tl
from clipflow.kernels.triton import _configs, _rows
from clipflow.kernels.triton._rows import group_sum_kernel as group_sum_kernel
from torch import Tensor

# Shape suffixes: R = tokens of all samples, D = channels, S = rows of modulation, each for the next
# R / S tokens: S is the batch, or R.

# do_not_specialize below names the numbers that change from batch to batch and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.


@triton.jit(do_not_specialize=["tokens", "group"])
def adaln_norm_fwd_kernel(
    x_ptr,  # [R, D]
    shift_ptr,  # [S, D] or None
    scale_ptr,  # [S, D]
    weight_ptr,  # [D] or None
    table_ptr,  # [2, D] or None
    y_ptr,  # [R, D]
    tokens,  # R
    group,  # R / S
    channels,  # D
    shift_stride,  # elements between two rows
    scale_stride,
    table_stride,
    eps,
    RMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, >= D
):
    # int64: token * channels can pass 2**31.
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < channels)[None, :]
    x = _rows.load_rows(x_ptr, token, channels, d, inside)
    normed, _ = _rows.normalize(x, inside, channels, eps, RMS)
    y = _rows.modulate(
        normed, token // group, d, inside, channels, shift_ptr, scale_ptr, weight_ptr, table_ptr,
        shift_stride, scale_stride, table_stride,
    )  # fmt: skip
    at = token[:, None] * channels + d[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["partial_size", "group", "chunks"])
def adaln_norm_bwd_kernel(
    grad_ptr,  # [R, D]
    x_ptr,  # [R, D]
    gain_ptr,  # [S, D] float32
    d_x_ptr,  # [R, D]
    partial_ptr,  # [2, S, chunks, D] float32: this chunk's part of d_offset, then of d_gain
    partial_size,  # S * chunks * D
    group,  # R / S
    channels,  # D
    chunks,
    eps,
    RMS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,  # rows that one program walks, a multiple of BLOCK_ROWS
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first_row = (program % chunks) * CHUNK_ROWS
    d = tl.arange(0, BLOCK_D)
    gain = _rows.load_vector(gain_ptr + sample * channels, d, channels)

    d_offset = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    d_gain = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for step in range(0, CHUNK_ROWS, BLOCK_ROWS):
        row = first_row + step + tl.arange(0, BLOCK_ROWS)
        inside = (row < group)[:, None] & (d < channels)[None, :]
        token = sample * group + row
        x = _rows.load_rows(x_ptr, token, channels, d, inside)
        grad = _rows.load_rows(grad_ptr, token, channels, d, inside)
        normed, rstd = _rows.normalize(x, inside, channels, eps, RMS)
        # Rows past the end have no variance: with eps = 0 their rstd is infinite.
        normed = tl.where(inside, normed, 0.0)
        d_x = _rows.norm_gradient(grad * gain, normed, rstd, channels, RMS)
        at = token[:, None] * channels + d[None, :]
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
        d_offset += grad
        d_gain += grad * normed

    partial_at = partial_ptr + program * channels + d
    tl.store(partial_at, tl.sum(d_offset, axis=0), mask=d < channels)
    tl.store(partial_at + partial_size, tl.sum(d_gain, axis=0), mask=d < channels)


@triton.jit(do_not_specialize=["tokens"])
def adaln_norm_bwd_tokenwise_kernel(
    grad_ptr,  # [R, D]
    x_ptr,  # [R, D]
    gain_ptr,  # [R, D] float32
    d_x_ptr,  # [R, D]
    d_offset_ptr,  # [R, D] float32
    d_gain_ptr,  # [R, D] float32
    tokens,  # R
    channels,  # D
    eps,
    RMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < channels)[None, :]
    x = _rows.load_rows(x_ptr, token, channels, d, inside)
    grad = _rows.load_rows(grad_ptr, token, channels, d, inside)
    gain = _rows.load_rows(gain_ptr, token, channels, d, inside)
    normed, rstd = _rows.normalize(x, inside, channels, eps, RMS)
    d_x = _rows.norm_gradient(grad * gain, normed, rstd, channels, RMS)
    at = token[:, None] * channels + d[None, :]
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(d_offset_ptr + at, grad, mask=inside)
    tl.store(d_gain_ptr + at, grad * normed, mask=inside)


def forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
    rms: bool,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Normalize and modulate `x`.

    Args:
        x: tokens, [..., D], contiguous; float32, bfloat16 or float16.
        shift: [S, D]; any stride between rows, channels contiguous.
        scale: as `shift`.
        weight: [D], contiguous.
        table: [2, D], as `shift`.
        rms: RMSNorm, not LayerNorm.
        eps: added to the variance or mean square.
        out: like `x`, contiguous, to write into; None for a new tensor.

    Returns:
        The shape and dtype of `x`; computed in float32. Arguments were checked by clipflow.ops.
    """
    y = torch.empty_like(x) if out is None else out
    if x.numel() == 0:
        return y
    D, S = x.shape[-1], scale.shape[0]
    R = x.numel() // D
    rows, block, warps = _configs.tile("adaln_norm", D, x.get_device())
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        adaln_norm_fwd_kernel[(triton.cdiv(R, rows),)](
            x, shift, scale, weight, table, y, R, R // S, D,
            *_rows.strides(shift, scale, table), eps,
            RMS=rms, BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, gain: Tensor, rms: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of norm(x) * gain + offset for the output's gradient `grad`.

    Args:
        grad: the shape and dtype of `x`, contiguous.
        x: as in `forward`.
        gain: [S, D], float32, contiguous.
        rms, eps: as in `forward`.

    Returns:
        (d_x like `x`, d_offset [S, D], d_gain [S, D]), the last two float32. Sums are taken in a
        fixed order, so two calls give the same bits.
    """
    d_x = torch.empty_like(x)
    if x.numel() == 0:
        return d_x, torch.zeros_like(gain), torch.zeros_like(gain)
    D, S = x.shape[-1], gain.shape[0]
    R = x.numel() // D
    rows, block, warps = _configs.tile("adaln_norm_backward", D, x.get_device())
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        if R == S:
            d_offset, d_gain = torch.empty_like(gain), torch.empty_like(gain)
            adaln_norm_bwd_tokenwise_kernel[(triton.cdiv(R, rows),)](
                grad, x, gain, d_x, d_offset, d_gain, R, D, eps,
                RMS=rms, BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
            )  # fmt: skip
            return d_x, d_offset, d_gain
        chunk_rows, chunks = _rows.chunks_of(R // S, rows)
        partial = torch.empty(2, S, chunks, D, dtype=torch.float32, device=x.device)
        adaln_norm_bwd_kernel[(S * chunks,)](
            grad, x, gain, d_x, partial, S * chunks * D, R // S, D, chunks, eps,
            RMS=rms, CHUNK_ROWS=chunk_rows, BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
        d_offset, d_gain = _rows.group_sums(partial).unbind(0)
    return d_x, d_offset, d_gain
