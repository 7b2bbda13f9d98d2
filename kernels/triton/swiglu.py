"""Triton kernels for SwiGLU; the op is defined in clipflow/ops/swiglu.py.

    y = a * s * b,   s = 1 / (1 + exp(-a))
    d_b = grad * a * s,   d_a = grad * b * s * (1 + a * (1 - s))

Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.

Bytes moved: forward reads a and b and writes y, backward reads grad, a and b and writes d_a and
d_b. Computed in float32 and rounded once. Every value takes the same steps wherever it lies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape suffixes: D = channels of one branch.

# Values of a branch that a program takes: 8 a lane of 4 warps.
BLOCK = 1024
WARPS = 4

# do_not_specialize below names the numbers that change from batch to batch and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.


@triton.jit
def _tile(program, rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return (row [ROWS, 1], channel [1, D], which of them exist) of a program's tile."""
    blocks = tl.cdiv(channels, BLOCK_D)
    row = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    d = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return row, d, (row < rows) & (d < channels)


@triton.jit(do_not_specialize=["rows"])
def swiglu_fwd_kernel(
    a_ptr,  # [rows, D]
    b_ptr,  # [rows, D]
    y_ptr,  # [rows, D], contiguous
    rows,
    channels,  # D
    a_stride,  # elements from one row to the next
    b_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, d, inside = _tile(tl.program_id(0), rows, channels, BLOCK_ROWS, BLOCK_D)
    a = tl.load(a_ptr + row * a_stride + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + d, mask=inside, other=0.0).to(tl.float32)
    y = a / (1.0 + tl.exp(-a)) * b
    tl.store(y_ptr + row * channels + d, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def swiglu_bwd_kernel(
    grad_ptr,  # [rows, D], contiguous
    a_ptr,  # [rows, D]
    b_ptr,  # [rows, D]
    d_a_ptr,  # [rows, D], contiguous
    d_b_ptr,  # [rows, D], contiguous
    rows,
    channels,  # D
    a_stride,  # elements from one row to the next
    b_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, d, inside = _tile(tl.program_id(0), rows, channels, BLOCK_ROWS, BLOCK_D)
    at = row * channels + d
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * a_stride + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + d, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-a))
    slope = sigmoid * (1.0 + a * (1.0 - sigmoid))
    element = d_a_ptr.dtype.element_ty
    tl.store(d_a_ptr + at, (grad * b * slope).to(element), mask=inside)
    tl.store(d_b_ptr + at, (grad * (a * sigmoid)).to(element), mask=inside)


def forward(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(a) * b.

    Args:
        a: the gate branch, [..., D]; float32, bfloat16 or float16. Read in place if its rows are
            contiguous and equally far apart, as a half of a projection's are.
        b: as `a`.
        out: [..., D], contiguous, to write into; None for a new tensor.

    Returns:
        [..., D], contiguous, dtype of `a`. Arguments were checked by clipflow.ops.
    """
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device) if out is None else out
    if y.numel() == 0:
        return y
    a, b = _rows(a), _rows(b)
    grid, tile = _tiles(a)
    with torch.cuda.device(a.get_device()):  # the CPU's -1, in the interpreter, does nothing
        swiglu_fwd_kernel[grid](a, b, y, a.shape[0], a.shape[1], a.stride(0), b.stride(0), **tile)
    return y


def backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `forward` at `a`, `b` for the output's gradient `grad`.

    Args:
        grad: [..., D], dtype of `a`.
        a: as in `forward`.
        b: as in `forward`.

    Returns:
        (d_a, d_b), [..., D] each, contiguous.
    """
    d_a, d_b = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2))
    if d_a.numel() == 0:
        return d_a, d_b
    a, b = _rows(a), _rows(b)
    grid, tile = _tiles(a)
    with torch.cuda.device(a.get_device()):  # the CPU's -1, in the interpreter, does nothing
        swiglu_bwd_kernel[grid](
            grad.contiguous(), a, b, d_a, d_b,
            a.shape[0], a.shape[1], a.stride(0), b.stride(0), **tile,
        )  # fmt: skip
    return d_a, d_b


def _rows(x: Tensor) -> Tensor:
    """`x` as [rows, D] with contiguous rows; a view where the rows are equally far apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tiles(a: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and how a program's values lie: by D alone."""
    rows, channels = a.shape
    block = min(BLOCK, triton.next_power_of_2(channels))
    tile_rows = BLOCK // block
    grid = triton.cdiv(rows, tile_rows) * triton.cdiv(channels, block)
    return (grid,), {"BLOCK_ROWS": tile_rows, "BLOCK_D": block, "num_warps": WARPS}
