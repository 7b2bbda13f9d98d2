"""Triton kernels for adaptive layer norm; the op is defined in clipflow/ops/adaln_norm.py.

    y[b, l, :] = normed * (1 + scale[b, :]) + shift[b, :],   normed = layer_norm(x[b, l, :])

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN.

A program holds whole tokens in registers. Bytes moved: forward reads x and writes y, 2 * B*L*D *
itemsize; backward reads grad and x and writes d_x, 3 * B*L*D * itemsize, and passes float32 partial
sums of the modulation gradients (about 16 rows of D a sample) from its first kernel to its second.
Nothing is chosen by the batch size and no atomics are used: a sample's results are the same bits
whatever else is in the batch.
"""

import torch
import triton
import triton.language as tl
from clipflow.kernels.triton import _configs, _rows
from torch import Tensor

# Shape suffixes: B = batch, L = tokens of a sample, D = channels.

# Channels x chunks that one program of the last backward stage sums at a time.
SUM_BLOCK_D = 64
SUM_BLOCK_CHUNKS = 32

# do_not_specialize below names the numbers that change from batch to batch and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.


@triton.jit(do_not_specialize=["tokens", "tokens_per_sample"])
def adaln_norm_fwd_kernel(
    x_ptr,  # [B*L, D]
    shift_ptr,  # [B, D]
    scale_ptr,  # [B, D]
    y_ptr,  # [B*L, D]
    tokens,  # B*L
    tokens_per_sample,  # L
    channels,  # D
    shift_stride,  # elements between two samples' shifts
    scale_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, >= D
):
    # int64: token * channels can pass 2**31.
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    sample = token // tokens_per_sample
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < channels)[None, :]

    at = token[:, None] * channels + d[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    centered, variance = _rows.moments(x, inside, channels)
    rstd = tl.rsqrt(variance + eps)

    scale_at = sample[:, None] * scale_stride + d[None, :]
    shift_at = sample[:, None] * shift_stride + d[None, :]
    scale = tl.load(scale_ptr + scale_at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + shift_at, mask=inside, other=0.0).to(tl.float32)
    y = centered * rstd[:, None] * (1.0 + scale) + shift
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["partial_size", "tokens_per_sample", "chunks"])
def adaln_norm_bwd_kernel(
    grad_ptr,  # [B*L, D]
    x_ptr,  # [B*L, D]
    scale_ptr,  # [B, D]
    d_x_ptr,  # [B*L, D]
    partial_ptr,  # [2, B, chunks, D] float32: this chunk's part of d_shift, then of d_scale
    partial_size,  # B * chunks * D
    tokens_per_sample,  # L
    channels,  # D
    chunks,
    scale_stride,
    eps,
    CHUNK_ROWS: tl.constexpr,  # rows that one program walks, a multiple of BLOCK_ROWS
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first_row = (program % chunks) * CHUNK_ROWS
    d = tl.arange(0, BLOCK_D)
    scale = tl.load(scale_ptr + sample * scale_stride + d, mask=d < channels, other=0.0)
    gain = (1.0 + scale.to(tl.float32))[None, :]

    d_shift = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    d_scale = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for step in range(0, CHUNK_ROWS, BLOCK_ROWS):
        row = first_row + step + tl.arange(0, BLOCK_ROWS)
        inside = (row < tokens_per_sample)[:, None] & (d < channels)[None, :]
        at = (sample * tokens_per_sample + row)[:, None] * channels + d[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)

        centered, variance = _rows.moments(x, inside, channels)
        rstd = tl.rsqrt(variance + eps)[:, None]
        normed = centered * rstd
        # Rows past the end have no variance: with eps = 0 their rstd is infinite.
        normed = tl.where(inside, normed, 0.0)

        d_normed = grad * gain
        mean_grad = (tl.sum(d_normed, axis=1) / channels)[:, None]
        mean_product = (tl.sum(d_normed * normed, axis=1) / channels)[:, None]
        d_x = (d_normed - mean_grad - normed * mean_product) * rstd
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)

        d_shift += grad
        d_scale += grad * normed

    partial_at = partial_ptr + program * channels + d
    tl.store(partial_at, tl.sum(d_shift, axis=0), mask=d < channels)
    tl.store(partial_at + partial_size, tl.sum(d_scale, axis=0), mask=d < channels)


@triton.jit(do_not_specialize=["partial_size", "chunks"])
def adaln_norm_bwd_sum_kernel(
    partial_ptr,  # [2, B, chunks, D] float32
    d_shift_ptr,  # [B, D]
    d_scale_ptr,  # [B, D]
    partial_size,  # B * chunks * D
    channels,  # D
    chunks,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_D)
    sample = tl.program_id(0).to(tl.int64) // blocks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_shift = tl.zeros((BLOCK_CHUNKS, BLOCK_D), tl.float32)
    d_scale = tl.zeros((BLOCK_CHUNKS, BLOCK_D), tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunk < chunks)[:, None] & (d < channels)[None, :]
        at = (sample * chunks + chunk)[:, None] * channels + d[None, :]
        d_shift += tl.load(partial_ptr + at, mask=inside, other=0.0)
        d_scale += tl.load(partial_ptr + partial_size + at, mask=inside, other=0.0)
    at = sample * channels + d
    element = d_shift_ptr.dtype.element_ty
    tl.store(d_shift_ptr + at, tl.sum(d_shift, axis=0).to(element), mask=d < channels)
    tl.store(d_scale_ptr + at, tl.sum(d_scale, axis=0).to(element), mask=d < channels)


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Normalize and modulate `x`.

    Args:
        x: tokens, [B, L, D], contiguous; float32, bfloat16 or float16.
        shift: [B, D]; any stride between samples, channels contiguous.
        scale: as `shift`; the modulation is (1 + scale).
        eps: added to the variance.

    Returns:
        [B, L, D], dtype of `x`; computed in float32. Arguments were checked by clipflow.ops.
    """
    B, L, D = x.shape
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    rows, block, warps = _configs.tile("adaln_norm", D, x.get_device())
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        adaln_norm_fwd_kernel[(triton.cdiv(B * L, rows),)](
            x, shift, scale, y, B * L, L, D, shift.stride(0), scale.stride(0), eps,
            BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return y


def backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` at `x`, `scale` for the output's gradient `grad`.

    Args:
        grad: [B, L, D], contiguous, dtype of `x`.
        x: as in `forward`.
        scale: as in `forward`.
        eps: as in `forward`.

    Returns:
        (d_x [B, L, D], d_shift [B, D], d_scale [B, D]), contiguous. Sums are float32 and taken in a
        fixed order, so two calls give the same bits.
    """
    B, L, D = x.shape
    d_x = torch.empty_like(x)
    if x.numel() == 0:
        zeros = scale.new_zeros(B, D)
        return d_x, zeros, zeros.clone()
    d_shift, d_scale = scale.new_empty(B, D), scale.new_empty(B, D)
    rows, block, warps = _configs.tile("adaln_norm_backward", D, x.get_device())
    chunk_rows = max(rows, _chunk_rows(L))
    chunks = triton.cdiv(L, chunk_rows)
    partial = torch.empty(2, B, chunks, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        adaln_norm_bwd_kernel[(B * chunks,)](
            grad, x, scale, d_x, partial, B * chunks * D, L, D, chunks, scale.stride(0), eps,
            CHUNK_ROWS=chunk_rows, BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
        adaln_norm_bwd_sum_kernel[(B * triton.cdiv(D, SUM_BLOCK_D),)](
            partial, d_shift, d_scale, B * chunks * D, D, chunks,
            BLOCK_CHUNKS=SUM_BLOCK_CHUNKS, BLOCK_D=SUM_BLOCK_D, num_warps=4,
        )  # fmt: skip
    return d_x, d_shift, d_scale


def _chunk_rows(tokens: int) -> int:
    """Rows that one backward program sums: about 16 chunks a sample, of 4 to 64 rows each.

    Depends on L alone: sums must not depend on the batch. 64 rows keep the partial sums' traffic
    under 5 %.
    """
    return min(64, max(4, triton.next_power_of_2(tokens) // 16))
