"""Triton kernel for the quantizing norm; the op is defined in clipflow/ops/adaln_norm_quant.py.

    y = norm(x) * weight * (1 + scale + table[1]) + shift + table[0], as adaln_norm
    scales = max |y| / most,   values = round(y / scales), half to even

Source: per-token symmetric quantization of Dettmers et al., "LLM.int8()" (2022), section 2.1, and
Micikevicius et al., "FP8 Formats for Deep Learning" (2022).

A program holds whole tokens in registers. Bytes moved: reads x and writes values, R*D * (itemsize +
1). float8_e4m3fn is converted by the GPU where it can (compute capability 8.9 and later) and by
integer arithmetic where it cannot, to the same bits.
"""

import torch
import triton
import triton.language as tl
from clipflow.kernels.triton import _configs, _rows
from torch import Tensor

# Shape suffixes: R = tokens of all samples, D = channels, S = rows of modulation, each for the next
# R / S tokens: S is the batch, or R.

MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def _round(x):
    """The nearest integer, half to even, for |x| < 2**22: 1.5 * 2**23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3_bits(x):
    """float8_e4m3fn of |x| <= 448 as its bits, rounded half to even; 0x7f for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: 3 of 23 fraction bits stay, and the exponent's bias falls from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2**-6: multiples of 2**-9, which is the distance of float32 numbers at 2**14.
    shifted = tl.abs(x) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) - 0x46800000  # the bits of 16384
    code = tl.where(tl.abs(x) < 0.015625, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(x == x, code, 0x7F).to(tl.uint8)


@triton.jit(do_not_specialize=["tokens", "group"])
def adaln_norm_quant_fwd_kernel(
    x_ptr,  # [R, D]
    shift_ptr,  # [S, D] or None
    scale_ptr,  # [S, D]
    weight_ptr,  # [D] or None
    table_ptr,  # [2, D] or None
    values_ptr,  # [R, D] int8, float8_e4m3fn, or its bits as uint8
    scales_ptr,  # [R] float32
    tokens,  # R
    group,  # R / S
    channels,  # D
    shift_stride,  # elements between two rows
    scale_stride,
    table_stride,
    eps,
    MOST: tl.constexpr,  # the largest value
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
    # tl.max leaves NaN out: it counts as infinity, and both give the scale NaN.
    magnitude = tl.where(tl.abs(y) <= 3.4028234663852886e38, tl.abs(y), float("inf"))
    largest = tl.max(tl.where(inside, magnitude, 0.0), axis=1)
    scales = tl.maximum(largest / MOST, 1.1754943508222875e-38)
    scales = tl.where(largest == float("inf"), float("nan"), scales)
    tl.store(scales_ptr + token, scales, mask=token < tokens)
    quotient = y * (1.0 / scales)[:, None]
    if values_ptr.dtype.element_ty == tl.int8:
        values = _round(quotient).to(tl.int8)
    elif values_ptr.dtype.element_ty == tl.uint8:
        values = _e4m3_bits(quotient)
    else:
        values = quotient.to(tl.float8e4nv)
    tl.store(values_ptr + token[:, None] * channels + d[None, :], values, mask=inside)


def forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
    rms: bool,
    eps: float,
    dtype: torch.dtype,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize, modulate and quantize `x`.

    Args:
        x: tokens, [..., D], contiguous; float32, bfloat16 or float16.
        shift: [S, D]; any stride between rows, channels contiguous.
        scale: as `shift`.
        weight: [D], contiguous.
        table: [2, D], as `shift`.
        rms: RMSNorm, not LayerNorm.
        eps: added to the variance or mean square.
        dtype: torch.int8 or torch.float8_e4m3fn.
        out: (values, scales) to write into, contiguous; None for new tensors.

    Returns:
        (values in the shape of `x`, scales [...] float32). Arguments were checked by clipflow.ops.
    """
    if out is None:
        values = torch.empty(x.shape, dtype=dtype, device=x.device)
        scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    else:
        values, scales = out
    if x.numel() == 0:
        return values, scales
    D, S = x.shape[-1], scale.shape[0]
    R = x.numel() // D
    in_bits = dtype == torch.float8_e4m3fn and not _configs.converts_float8(x.get_device())
    rows, block, warps = _configs.tile("adaln_norm_quant", D, x.get_device())
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        adaln_norm_quant_fwd_kernel[(triton.cdiv(R, rows),)](
            x, shift, scale, weight, table, values.view(torch.uint8) if in_bits else values, scales,
            R, R // S, D, *_rows.strides(shift, scale, table), eps,
            MOST=MOST[dtype], RMS=rms, BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return values, scales
