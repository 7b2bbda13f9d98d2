"""Triton kernels for the gated residual norm; the op is in clipflow/ops/gated_residual_norm.py.

    h = x + (gate + gate_table) * y
    normed = norm(h) * (1 + scale + table[1]) + shift + table[0],   h as it is stored

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN.

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

# Shape suffixes: R = tokens of all samples, D = channels, S = rows of modulation, each for the next
# R / S tokens: S is the batch, or R.

# do_not_specialize below names the numbers that change from batch to batch and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.


@triton.jit(do_not_specialize=["tokens", "group"])
def gated_residual_norm_fwd_kernel(
    x_ptr,  # [R, D]
    y_ptr,  # [R, D]
    gate_ptr,  # [S, D] or None
    shift_ptr,  # [S, D] or None
    scale_ptr,  # [S, D]
    gate_table_ptr,  # [D] or None
    table_ptr,  # [2, D] or None
    h_ptr,  # [R, D]
    normed_ptr,  # [R, D]
    tokens,  # R
    group,  # R / S
    channels,  # D
    gate_stride,  # elements between two rows
    shift_stride,
    scale_stride,
    table_stride,
    eps,
    RMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, >= D
):
    # int64: token * channels can pass 2**31.
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    sample = token // group
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < channels)[None, :]
    h = _rows.load_rows(x_ptr, token, channels, d, inside)
    branch = _rows.load_rows(y_ptr, token, channels, d, inside)
    if gate_ptr is not None:
        gate = _rows.load_rows(gate_ptr, sample, gate_stride, d, inside)
        if gate_table_ptr is not None:
            gate += _rows.load_vector(gate_table_ptr, d, channels)
        branch *= gate
    stored = (h + branch).to(h_ptr.dtype.element_ty)
    at = token[:, None] * channels + d[None, :]
    tl.store(h_ptr + at, stored, mask=inside)
    normed, _ = _rows.normalize(stored.to(tl.float32), inside, channels, eps, RMS)
    normed = _rows.modulate(
        normed, sample, d, inside, channels, shift_ptr, scale_ptr, None, table_ptr,
        shift_stride, scale_stride, table_stride,
    )  # fmt: skip
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_normed(h_ptr, token, d, inside, channels, eps, RMS: tl.constexpr):
    """Return norm(h) of a tile of tokens, zero outside, and its rstd."""
    h = _rows.load_rows(h_ptr, token, channels, d, inside)
    normed, rstd = _rows.normalize(h, inside, channels, eps, RMS)
    # Rows past the end have no variance: with eps = 0 their rstd is infinite.
    return tl.where(inside, normed, 0.0), rstd


@triton.jit
def _stream_gradient(
    d_h_ptr, d_normed, normed, rstd, gain, token, d, inside, channels, RMS: tl.constexpr
):
    """The gradient of h of a tile of tokens, zero outside."""
    d_norm = _rows.norm_gradient(d_normed * gain, normed, rstd, channels, RMS)
    return tl.where(inside, _rows.load_rows(d_h_ptr, token, channels, d, inside) + d_norm, 0.0)


@triton.jit(do_not_specialize=["partial_size", "group", "chunks"])
def gated_residual_norm_bwd_kernel(
    d_h_ptr,  # [R, D]
    d_normed_ptr,  # [R, D]
    h_ptr,  # [R, D]
    y_ptr,  # [R, D], None without a gate
    gate_ptr,  # [S, D] float32 or None
    gain_ptr,  # [S, D] float32
    d_x_ptr,  # [R, D]
    d_y_ptr,  # [R, D], None without a gate
    partial_ptr,  # [3, S, chunks, D] float32: parts of d_offset, d_gain and, with a gate, d_gate
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

    d_offset = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    d_gain = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    d_gate = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for step in range(0, CHUNK_ROWS, BLOCK_ROWS):
        row = first_row + step + tl.arange(0, BLOCK_ROWS)
        inside = (row < group)[:, None] & (d < channels)[None, :]
        token = sample * group + row
        normed, rstd = _load_normed(h_ptr, token, d, inside, channels, eps, RMS)
        d_normed = _rows.load_rows(d_normed_ptr, token, channels, d, inside)
        d_offset += d_normed
        d_gain += d_normed * normed
        gain = _rows.load_vector(gain_ptr + sample * channels, d, channels)
        total = _stream_gradient(
            d_h_ptr, d_normed, normed, rstd, gain, token, d, inside, channels, RMS
        )
        at = token[:, None] * channels + d[None, :]
        tl.store(d_x_ptr + at, total.to(d_x_ptr.dtype.element_ty), mask=inside)
        if gate_ptr is not None:
            gate = _rows.load_vector(gate_ptr + sample * channels, d, channels)
            tl.store(d_y_ptr + at, (total * gate).to(d_y_ptr.dtype.element_ty), mask=inside)
            d_gate += total * _rows.load_rows(y_ptr, token, channels, d, inside)

    partial_at = partial_ptr + program * channels + d
    tl.store(partial_at, tl.sum(d_offset, axis=0), mask=d < channels)
    tl.store(partial_at + partial_size, tl.sum(d_gain, axis=0), mask=d < channels)
    if gate_ptr is not None:
        tl.store(partial_at + 2 * partial_size, tl.sum(d_gate, axis=0), mask=d < channels)


@triton.jit(do_not_specialize=["tokens", "partial_size"])
def gated_residual_norm_bwd_tokenwise_kernel(
    d_h_ptr,  # [R, D]
    d_normed_ptr,  # [R, D]
    h_ptr,  # [R, D]
    y_ptr,  # [R, D], None without a gate
    gate_ptr,  # [R, D] float32 or None
    gain_ptr,  # [R, D] float32
    d_x_ptr,  # [R, D]
    d_y_ptr,  # [R, D], None without a gate
    partial_ptr,  # [3, R, D] float32: d_offset, d_gain and, with a gate, d_gate
    partial_size,  # R * D
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
    gain = _rows.load_rows(gain_ptr, token, channels, d, inside)
    normed, rstd = _load_normed(h_ptr, token, d, inside, channels, eps, RMS)
    d_normed = _rows.load_rows(d_normed_ptr, token, channels, d, inside)
    total = _stream_gradient(d_h_ptr, d_normed, normed, rstd, gain, token, d, inside, channels, RMS)
    at = token[:, None] * channels + d[None, :]
    tl.store(d_x_ptr + at, total.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + at, d_normed, mask=inside)
    tl.store(partial_ptr + partial_size + at, d_normed * normed, mask=inside)
    if gate_ptr is not None:
        gate = _rows.load_rows(gate_ptr, token, channels, d, inside)
        y = _rows.load_rows(y_ptr, token, channels, d, inside)
        tl.store(d_y_ptr + at, (total * gate).to(d_y_ptr.dtype.element_ty), mask=inside)
        tl.store(partial_ptr + 2 * partial_size + at, total * y, mask=inside)


def forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    gate_table: Tensor | None,
    table: Tensor | None,
    rms: bool,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the gated branch and normalize the sum.

    Args:
        x: tokens, [..., D], contiguous; float32, bfloat16 or float16.
        y: as `x`.
        gate: [S, D]; any stride between rows, channels contiguous.
        shift, scale: as `gate`.
        gate_table: [D], contiguous.
        table: [2, D], as `gate`.
        rms: RMSNorm, not LayerNorm.
        eps: added to the variance or mean square.
        out: (h, normed) to write into, contiguous; h may be `x`, and normed `y`. None for new ones.

    Returns:
        (h, normed) like `x`; computed in float32. Arguments were checked by clipflow.ops.
    """
    h, normed = (torch.empty_like(x), torch.empty_like(x)) if out is None else out
    if x.numel() == 0:
        return h, normed
    D, S = x.shape[-1], scale.shape[0]
    R = x.numel() // D
    rows, block, warps = _configs.tile("gated_residual_norm", D, x.get_device())
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        gated_residual_norm_fwd_kernel[(triton.cdiv(R, rows),)](
            x, y, gate, shift, scale, gate_table, table, h, normed, R, R // S, D,
            *_rows.strides(gate, shift, scale, table), eps,
            RMS=rms, BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return h, normed


def backward(
    d_h: Tensor,
    d_normed: Tensor,
    h: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gain: Tensor,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h = x + gate * y and normed = norm(h) * gain + offset.

    Args:
        d_h, d_normed: the outputs' gradients, like `h`, contiguous.
        h: of `forward`, [..., D].
        y: as in `forward`; None without a gate.
        gate: [S, D], float32, contiguous; or None.
        gain: [S, D], float32, contiguous.
        rms, eps: as in `forward`.

    Returns:
        (d_x, d_y, d_gate, d_offset, d_gain), the last three [S, D] float32; d_y and d_gate are
        empty without a gate. Sums are taken in a fixed order, so two calls give the same bits.
    """
    d_x = torch.empty_like(h)
    d_y = h.new_empty(0) if gate is None else torch.empty_like(h)
    D, S = h.shape[-1], gain.shape[0]
    if h.numel() == 0:
        sums = gain.new_zeros(3, S, D)
        return d_x, d_y, gain.new_empty(0) if gate is None else sums[2], sums[0], sums[1]
    R, parts = h.numel() // D, 2 if gate is None else 3
    rows, block, warps = _configs.tile("gated_residual_norm_backward", D, h.get_device())
    chunk_rows, chunks = (1, 1) if R == S else _rows.chunks_of(R // S, rows)
    partial = torch.empty(parts, S, chunks, D, dtype=torch.float32, device=h.device)
    pointers = (d_h, d_normed, h, y, gate, gain, d_x, None if gate is None else d_y, partial)
    with torch.cuda.device(h.get_device()):  # the CPU's -1, in the interpreter, does nothing
        if R == S:
            gated_residual_norm_bwd_tokenwise_kernel[(triton.cdiv(R, rows),)](
                *pointers, R * D, R, D, eps,
                RMS=rms, BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
            )  # fmt: skip
        else:
            gated_residual_norm_bwd_kernel[(S * chunks,)](
                *pointers, S * chunks * D, R // S, D, chunks, eps,
                RMS=rms, CHUNK_ROWS=chunk_rows, BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
            )  # fmt: skip
        sums = _rows.group_sums(partial)
    return d_x, d_y, gain.new_empty(0) if gate is None else sums[2], sums[0], sums[1]
