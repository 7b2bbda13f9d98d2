"""What the row kernels share: norms and their gradients, modulation, sums over chunks of rows.

A tile is [ROWS, BLOCK_D]: whole rows in registers, zero where `inside` is false. All is float32.

Modulation has S rows, each for the next `group` rows of x: gain = weight * (1 + scale + table[1])
and offset = shift + table[0]. Where a backward sums over a group, it walks chunks of it, writes
each chunk's sums, and `group_sum_kernel` adds the chunks up: a fixed order, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Channels x chunks that one program of group_sum_kernel sums at a time.
SUM_BLOCK_D = 64
SUM_BLOCK_CHUNKS = 32


@triton.jit
def moments(x, inside, channels):
    """Return (x - mean [ROWS, D], variance [ROWS]) of the rows of a tile; zero outside."""
    mean = tl.sum(x, axis=1) / channels
    # Masked lanes would add mean**2 to the variance.
    centered = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / channels
    return centered, variance


@triton.jit
def normalize(x, inside, channels, eps, RMS: tl.constexpr):
    """Return (normed [ROWS, D], rstd [ROWS, 1]); outside rows may be NaN."""
    if RMS:
        centered = x
        square = tl.sum(x * x, axis=1) / channels
    else:
        centered, square = moments(x, inside, channels)
    rstd = tl.rsqrt(square + eps)[:, None]
    return centered * rstd, rstd


@triton.jit
def norm_gradient(d_normed, normed, rstd, channels, RMS: tl.constexpr):
    """The gradient of what was normalized, from that of `normed`."""
    mean_product = (tl.sum(d_normed * normed, axis=1) / channels)[:, None]
    if RMS:
        return (d_normed - normed * mean_product) * rstd
    mean_grad = (tl.sum(d_normed, axis=1) / channels)[:, None]
    return (d_normed - mean_grad - normed * mean_product) * rstd


@triton.jit
def load_vector(ptr, d, channels):
    """[1, D] float32 of the channels."""
    return tl.load(ptr + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_rows(ptr, row, stride, d, inside):
    """The tile of the rows that begin `stride` apart, in float32."""
    at = row[:, None] * stride + d[None, :]
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def modulate(
    normed,
    sample,  # [ROWS]: the row of modulation of each row of the tile
    d,
    inside,
    channels,
    shift_ptr,  # [S, D] or None
    scale_ptr,  # [S, D]
    weight_ptr,  # [D] or None
    table_ptr,  # [2, D] or None
    shift_stride,
    scale_stride,
    table_stride,
):
    """normed * weight * (1 + scale + table[1]) + shift + table[0]."""
    scale = load_rows(scale_ptr, sample, scale_stride, d, inside)
    if table_ptr is not None:
        scale += load_vector(table_ptr + table_stride, d, channels)
    y = normed
    if weight_ptr is not None:
        y *= load_vector(weight_ptr, d, channels)
    y *= 1.0 + scale
    if shift_ptr is not None:
        y += load_rows(shift_ptr, sample, shift_stride, d, inside)
    if table_ptr is not None:
        y += load_vector(table_ptr, d, channels)
    return y


@triton.jit(do_not_specialize=["chunks"])
def group_sum_kernel(
    partial_ptr,  # [G, chunks, D] float32
    sum_ptr,  # [G, D] float32
    channels,  # D
    chunks,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_D)
    group = tl.program_id(0).to(tl.int64) // blocks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_CHUNKS, BLOCK_D), tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunk < chunks)[:, None] & (d < channels)[None, :]
        at = (group * chunks + chunk)[:, None] * channels + d[None, :]
        total += tl.load(partial_ptr + at, mask=inside, other=0.0)
    tl.store(sum_ptr + group * channels + d, tl.sum(total, axis=0), mask=d < channels)


def chunks_of(group: int, rows: int) -> tuple[int, int]:
    """Rows that one backward program sums, in steps of `rows`, and such chunks of a group.

    About 16 chunks a group, of 4 to 64 rows each, by the group's length alone: sums must not depend
    on the batch. 64 rows keep the partial sums' traffic under 5 %.
    """
    chunk_rows = max(rows, min(64, max(4, triton.next_power_of_2(group) // 16)))
    return chunk_rows, triton.cdiv(group, chunk_rows)


def group_sums(partial: Tensor) -> Tensor:
    """The sums over chunks, [P, S, D], of `partial` [P, S, chunks, D], float32, contiguous."""
    P, S, chunks, D = partial.shape
    if chunks == 1:
        return partial.view(P, S, D)
    total = torch.empty(P, S, D, dtype=torch.float32, device=partial.device)
    group_sum_kernel[(P * S * triton.cdiv(D, SUM_BLOCK_D),)](
        partial, total, D, chunks,
        BLOCK_CHUNKS=SUM_BLOCK_CHUNKS, BLOCK_D=SUM_BLOCK_D, num_warps=4,
    )  # fmt: skip
    return total


def strides(*modulation: Tensor | None) -> tuple[int, ...]:
    """Elements from row to row of each; 0 for None."""
    return tuple(0 if rows is None else rows.stride(0) for rows in modulation)
