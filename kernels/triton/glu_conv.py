"""Triton kernels for the gated depthwise convolution, defined in clipflow/ops/glu_conv.py.

    (a, g) = conv3x3(u) + bias,   y = a * SiLU(g),   u = x, or SiLU(x)

Source: Xie et al., "SANA" (2024), section 2.2 (Mix-FFN); DC-AE (2024) has the same block.

A program holds a stretch of a grid row, in some of the channels, and goes down a band of rows: each
row that it loads, at its place and one to either side, is added to the output rows above, at and
below it. Places outside of the grid add nothing, not even 0 * NaN. Bytes moved: forward reads x,
(1 + 2 / BAND) times as far as the caches do not keep the rows that bands share, and writes y;
backward does that again to write the gradient of the convolution in float32, then reads it with x,
writes d_x, and passes float32 sums of the gradients of the weights from one kernel to the next.
Nothing is chosen by the batch size and no atomics are used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape suffixes: B = batch, h, w = sides of the grid, C = 2M channels, M = channels of the output.

# Rows that a program goes down: 16 programs for each of 32 channels at SANA's 32x32 and B = 1.
BAND = 8
# Channels x bands that one program of the last backward stage sums at a time.
SUM_BLOCK_C = 32
SUM_BLOCK_BANDS = 32

# do_not_specialize below names the numbers that change from batch to batch and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_slope(x):
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def _program(h, w, channels, BAND: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return this program's (sample, first row, columns, channels, number among the bands)."""
    blocks = tl.cdiv(channels, BLOCK_C)
    strips = tl.cdiv(w, BLOCK_W)
    band = tl.program_id(0) // blocks
    column = (band % strips) * BLOCK_W + tl.arange(0, BLOCK_W)
    bands = tl.cdiv(h, BAND)
    row = (band // strips % bands) * BAND
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    # int64: offsets can pass 2**31.
    return (band // strips // bands).to(tl.int64), row, column, c, band.to(tl.int64)


@triton.jit
def _tap(weight_ptr, c, inside_c, inside, KY: tl.constexpr, KX: tl.constexpr, FLIP: tl.constexpr):
    """Weights of one tap, [BLOCK_W, BLOCK_C]; 0 where it looks outside of the grid."""
    tap: tl.constexpr = 8 - (KY * 3 + KX) if FLIP else KY * 3 + KX
    weight = tl.load(weight_ptr + c * 9 + tap, mask=inside_c, other=0.0).to(tl.float32)
    return tl.where(inside[:, None], weight[None, :], 0.0)


@triton.jit
def _add_row(
    sum, left, middle, right, weight_ptr, c, inside_c, column, w, KY: tl.constexpr,
    FLIP: tl.constexpr,  # the kernel turned by 180 degrees, as the gradient of x needs it
):  # fmt: skip
    """`sum` plus row KY of the kernel over the inputs to the left, at and to the right."""
    sum += _tap(weight_ptr, c, inside_c, column > 0, KY, 0, FLIP) * left
    sum += _tap(weight_ptr, c, inside_c, column < w, KY, 1, FLIP) * middle
    sum += _tap(weight_ptr, c, inside_c, column + 1 < w, KY, 2, FLIP) * right
    return sum


@triton.jit
def _take(row_ptr, column, w, stride, c, channel_inside, PRE_SILU: tl.constexpr):
    """Values of the row at `row_ptr`, [BLOCK_W, BLOCK_C]; 0 outside of the grid."""
    inside = ((column >= 0) & (column < w))[:, None] & channel_inside[None, :]
    at = row_ptr + column[:, None].to(tl.int64) * stride + c[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return _silu(value) if PRE_SILU else value


@triton.jit
def _add_rows(sums, left, middle, right, weight_ptr, start, c, inside_c, column, w,
              FLIP: tl.constexpr):  # fmt: skip
    """Add a row of inputs to the sums of the rows above, at and below it; `start` a new one below.

    Returns the finished row above, and the two that are not.
    """
    above, here = sums
    done = _add_row(above, left, middle, right, weight_ptr, c, inside_c, column, w, 2, FLIP)
    here = _add_row(here, left, middle, right, weight_ptr, c, inside_c, column, w, 1, FLIP)
    below = _add_row(start, left, middle, right, weight_ptr, c, inside_c, column, w, 0, FLIP)
    return done, (here, below)


@triton.jit
def _bias(bias_ptr, c, channel_inside, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    bias = tl.load(bias_ptr + c, mask=channel_inside, other=0.0).to(tl.float32)
    return tl.broadcast_to(bias[None, :], (BLOCK_W, BLOCK_C))


@triton.jit(do_not_specialize=["h", "w"])
def glu_conv_fwd_kernel(
    x_ptr,  # [B, h, w, 2M], the tokens any stride apart
    weight_ptr,  # [2M, 9]
    bias_ptr,  # [2M]
    y_ptr,  # [B, h, w, M]; in the backward, the gradient of y
    d_conv_ptr,  # [B, h, w, 2M] float32, in the backward
    h,
    w,
    half,  # M
    sample_stride,
    token_stride,
    PRE_SILU: tl.constexpr,
    BACKWARD: tl.constexpr,  # write the gradient of the convolution instead of y
    BAND: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, first, column, c, _ = _program(h, w, half, BAND, BLOCK_W, BLOCK_C)
    last = tl.minimum(first + BAND, h)
    inside_c = c < half
    inside = (column < w)[:, None] & inside_c[None, :]
    a_bias = _bias(bias_ptr, c, inside_c, BLOCK_W, BLOCK_C)
    g_bias = _bias(bias_ptr + half, c, inside_c, BLOCK_W, BLOCK_C)
    g_weight_ptr = weight_ptr + half * 9
    # The sums of the row above and of the row at hand. Rows before the band are not written.
    a_sums, g_sums = (a_bias, a_bias), (g_bias, g_bias)
    # One more step than rows of x: below the last row of the grid nothing is added.
    for row in range(tl.maximum(first - 1, 0), last + 1):
        a_done, g_done = a_sums[0], g_sums[0]
        if row < h:
            at = x_ptr + sample * sample_stride + tl.cast(row, tl.int64) * w * token_stride
            left = _take(at, column - 1, w, token_stride, c, inside_c, PRE_SILU)
            middle = _take(at, column, w, token_stride, c, inside_c, PRE_SILU)
            right = _take(at, column + 1, w, token_stride, c, inside_c, PRE_SILU)
            a_done, a_sums = _add_rows(
                a_sums, left, middle, right, weight_ptr, a_bias, c, inside_c, column, w, False
            )
            left = _take(at + half, column - 1, w, token_stride, c, inside_c, PRE_SILU)
            middle = _take(at + half, column, w, token_stride, c, inside_c, PRE_SILU)
            right = _take(at + half, column + 1, w, token_stride, c, inside_c, PRE_SILU)
            g_done, g_sums = _add_rows(
                g_sums, left, middle, right, g_weight_ptr, g_bias, c, inside_c, column, w, False
            )
        token = (sample * h + row - 1) * w + column[:, None]
        write = inside & (row > first)
        if BACKWARD:
            grad = tl.load(y_ptr + token * half + c[None, :], mask=write, other=0.0).to(tl.float32)
            at = d_conv_ptr + token * (2 * half) + c[None, :]
            tl.store(at, grad * _silu(g_done), mask=write)
            tl.store(at + half, grad * a_done * _silu_slope(g_done), mask=write)
        else:
            y = (a_done * _silu(g_done)).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + token * half + c[None, :], y, mask=write)


@triton.jit
def _weight_row(
    taps, gradient, inside, x_ptr, row, h, column, w, stride, c, inside_c, PRE_SILU: tl.constexpr
):
    """Add to `taps`, a tile for each, the products of `gradient` with row `row` of u beside it."""
    left, middle, right = taps
    # Outside of the grid u is 0, and 0 * NaN is NaN: so it is in PyTorch's gradient of the weights.
    width = tl.where((row >= 0) & (row < h), w, 0)
    at = x_ptr + tl.cast(row, tl.int64) * w * stride
    u = _take(at, column - 1, width, stride, c, inside_c, PRE_SILU)
    left += tl.where(inside, u * gradient, 0.0)
    u = _take(at, column, width, stride, c, inside_c, PRE_SILU)
    middle += tl.where(inside, u * gradient, 0.0)
    u = _take(at, column + 1, width, stride, c, inside_c, PRE_SILU)
    right += tl.where(inside, u * gradient, 0.0)
    return left, middle, right


@triton.jit(do_not_specialize=["h", "w", "partial_size"])
def glu_conv_bwd_kernel(
    d_conv_ptr,  # [B, h, w, C] float32
    x_ptr,  # [B, h, w, C], the tokens any stride apart
    weight_ptr,  # [C, 9]
    d_x_ptr,  # [B, h, w, C]
    partial_ptr,  # [10, bands, C] float32: this band's part of d_weight, tap by tap, and of d_bias
    h,
    w,
    channels,  # C
    sample_stride,
    token_stride,
    partial_size,  # bands * C
    PRE_SILU: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, first, column, c, band = _program(h, w, channels, BAND, BLOCK_W, BLOCK_C)
    last = tl.minimum(first + BAND, h)
    inside_c = c < channels
    inside = (column < w)[:, None] & inside_c[None, :]
    x = x_ptr + sample * sample_stride
    zero = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    bias, sums = zero, (zero, zero)
    top, center, bottom = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    for row in range(tl.maximum(first - 1, 0), last + 1):
        done = sums[0]
        if row < h:
            at = d_conv_ptr + (sample * h + row) * w * channels
            left = _take(at, column - 1, w, channels, c, inside_c, False)
            middle = _take(at, column, w, channels, c, inside_c, False)
            right = _take(at, column + 1, w, channels, c, inside_c, False)
            done, sums = _add_rows(
                sums, left, middle, right, weight_ptr, zero, c, inside_c, column, w, True
            )
            if (row >= first) & (row < last):
                bias += middle
                top = _weight_row(
                    top, middle, inside, x, row - 1, h, column, w, token_stride, c, inside_c,
                    PRE_SILU,
                )  # fmt: skip
                center = _weight_row(
                    center, middle, inside, x, row, h, column, w, token_stride, c, inside_c,
                    PRE_SILU,
                )  # fmt: skip
                bottom = _weight_row(
                    bottom, middle, inside, x, row + 1, h, column, w, token_stride, c, inside_c,
                    PRE_SILU,
                )  # fmt: skip
        if row > first:
            if PRE_SILU:
                at = x + tl.cast(row - 1, tl.int64) * w * token_stride
                done *= _silu_slope(_take(at, column, w, token_stride, c, inside_c, False))
            token = (sample * h + row - 1) * w + column[:, None]
            d_x = done.to(d_x_ptr.dtype.element_ty)
            tl.store(d_x_ptr + token * channels + c[None, :], d_x, mask=inside)

    at = partial_ptr + band * channels + c
    for tap in tl.static_range(3):
        tl.store(at + tap * partial_size, tl.sum(top[tap], axis=0), mask=inside_c)
        tl.store(at + (3 + tap) * partial_size, tl.sum(center[tap], axis=0), mask=inside_c)
        tl.store(at + (6 + tap) * partial_size, tl.sum(bottom[tap], axis=0), mask=inside_c)
    tl.store(at + 9 * partial_size, tl.sum(bias, axis=0), mask=inside_c)


@triton.jit(do_not_specialize=["bands", "partial_size"])
def glu_conv_bwd_sum_kernel(
    partial_ptr,  # [10, bands, C] float32
    d_weight_ptr,  # [C, 9]
    d_bias_ptr,  # [C]
    channels,  # C
    bands,
    partial_size,  # bands * C
    BLOCK_BANDS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    tap = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_BANDS, BLOCK_C), tl.float32)
    for first in range(0, bands, BLOCK_BANDS):
        band = first + tl.arange(0, BLOCK_BANDS)
        inside = (band < bands)[:, None] & (c < channels)[None, :]
        at = tap.to(tl.int64) * partial_size + band[:, None].to(tl.int64) * channels + c[None, :]
        sums += tl.load(partial_ptr + at, mask=inside, other=0.0)
    total = tl.sum(sums, axis=0).to(d_weight_ptr.dtype.element_ty)
    if tap < 9:
        tl.store(d_weight_ptr + c * 9 + tap, total, mask=c < channels)
    else:
        tl.store(d_bias_ptr + c, total, mask=c < channels)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    pre_silu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve and gate `x`.

    Args:
        x: tokens, [B, h*w, 2M], channels contiguous; float32, bfloat16 or float16.
        weight: [2M, 1, 3, 3], contiguous.
        bias: [2M], contiguous.
        grid: (h, w).
        pre_silu: whether the convolution is of SiLU(x).
        out: [B, h*w, M], contiguous, to write into; None for a new tensor.

    Returns:
        [B, h*w, M], dtype of `x`; computed in float32. Arguments were checked by clipflow.ops.
    """
    B, N, C = x.shape
    y = torch.empty(B, N, C // 2, dtype=x.dtype, device=x.device) if out is None else out
    if B > 0:
        _convolve(x, weight, bias, y, y, grid, pre_silu, backward=False)
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    pre_silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` for the output's gradient `grad`.

    Args:
        grad: [B, h*w, M], contiguous, dtype of `x`.
        x: as in `forward`, with the other arguments.
        weight: as in `forward`.
        bias: as in `forward`.
        grid: as in `forward`.
        pre_silu: as in `forward`.

    Returns:
        (d_x [B, h*w, 2M], d_weight [2M, 1, 3, 3], d_bias [2M]), contiguous. Sums are float32 and
        taken in a fixed order, so two calls give the same bits.
    """
    B, N, C = x.shape
    if B == 0:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    d_conv = torch.empty(B, N, C, dtype=torch.float32, device=x.device)
    _convolve(x, weight, bias, grad, d_conv, grid, pre_silu, backward=True)

    d_x = torch.empty(B, N, C, dtype=x.dtype, device=x.device)
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias)
    h, w = grid
    block_w, block_c = _tile(w, C)
    bands = B * triton.cdiv(h, BAND) * triton.cdiv(w, block_w)
    partial = torch.empty(10, bands, C, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        glu_conv_bwd_kernel[(bands * triton.cdiv(C, block_c),)](
            d_conv, x, weight, d_x, partial, h, w, C, x.stride(0), x.stride(1), bands * C,
            PRE_SILU=pre_silu, BAND=BAND, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
        glu_conv_bwd_sum_kernel[(10 * triton.cdiv(C, SUM_BLOCK_C),)](
            partial, d_weight, d_bias, C, bands, bands * C,
            BLOCK_BANDS=SUM_BLOCK_BANDS, BLOCK_C=SUM_BLOCK_C, num_warps=4,
        )  # fmt: skip
    return d_x, d_weight, d_bias


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    d_conv: Tensor,
    grid: tuple[int, int],
    pre_silu: bool,
    *,
    backward: bool,
) -> None:
    """Write `y`, or with `backward` the gradient of the convolution, where `y` is that of y."""
    (h, w), half = grid, x.shape[2] // 2
    block_w, block_c = _tile(w, half)
    bands = x.shape[0] * triton.cdiv(h, BAND) * triton.cdiv(w, block_w)
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        glu_conv_fwd_kernel[(bands * triton.cdiv(half, block_c),)](
            x, weight, bias, y, d_conv, h, w, half, x.stride(0), x.stride(1),
            PRE_SILU=pre_silu, BACKWARD=backward,
            BAND=BAND, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip


def _tile(w: int, channels: int) -> tuple[int, int]:
    """Columns and channels that a program holds: 512 values of each half, 4 a lane."""
    return min(16, triton.next_power_of_2(w)), min(32, triton.next_power_of_2(channels))
