"""Triton kernels for CLIP features; the op is defined in clipflow/ops/clip_normalize.py.

    p = mean of pool x pool neighboring tokens of x
    l2:           n = max(|p|, eps),  y = p / n,  d_p = (g - y * sum(g * y)) / n, below eps g / n
    layer:        y = (p - mean(p)) * r,  d_p = r * (g - mean(g) - y * mean(g * y))
    standardize:  y = (p - mean[c]) / max(std[c], eps), or its inverse;  d_p = g / s, or g * s
    d_x = d_p / pool**2 for each of the pooled tokens

Source: BLIP3-o (2025), section 3, diffuses pooled CLIP features; UniLIP (2025) standardizes them.

A program holds whole pooled tokens in registers. Bytes moved: forward reads x and writes y;
backward reads grad and x (not for standardize) and writes d_x. Nothing is chosen by the number of
tokens.
"""

import math

import torch
import triton
import triton.language as tl
from clipflow.kernels.triton import _configs, _rows
from torch import Tensor

# Shape suffixes: B = batch, N = tokens (side x side), M = pooled tokens, C = channels.

# do_not_specialize below names the numbers that change from batch to batch and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.


@triton.jit
def _first_token(token, side, POOL: tl.constexpr):
    """The token of x where the square of pooled token `token` begins."""
    if POOL == 1:
        return token
    pooled_side = side // POOL
    sample = token // (pooled_side * pooled_side)
    place = token % (pooled_side * pooled_side)
    return (sample * side + place // pooled_side * POOL) * side + place % pooled_side * POOL


@triton.jit
def _pooled(x_ptr, first, inside, d, side, channels, POOL: tl.constexpr):
    """The tile of pooled tokens [ROWS, D] whose squares begin at tokens `first`, zero outside."""
    at = first[:, None] * channels + d[None, :]
    if POOL == 1:
        return tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros(inside.shape, tl.float32)
    for row in range(POOL):
        for column in tl.static_range(POOL):
            to = (row * side + column).to(tl.int64) * channels
            total += tl.load(x_ptr + at + to, mask=inside, other=0.0).to(tl.float32)
    return total / (POOL * POOL)


@triton.jit
def _center_and_factor(p, inside, channels, eps, MODE: tl.constexpr):
    """Return (p or p - mean [ROWS, D], factor [ROWS], clamped [ROWS]): y = centered * factor.

    `clamped` says where the length is below eps and thus a constant.
    """
    if MODE == "l2":
        length = tl.sqrt(tl.sum(p * p, axis=1))
        clamped = length < eps  # false for NaN, which must come out
        return p, 1.0 / tl.where(clamped, eps, length), clamped
    centered, variance = _rows.moments(p, inside, channels)
    return centered, tl.rsqrt(variance + eps), variance < 0.0


@triton.jit
def _spread(std_ptr, d, channels, eps):
    """max(std, eps) of the channels; NaN stays NaN."""
    std = tl.load(std_ptr + d, mask=d < channels, other=1.0)
    return tl.where(std < eps, eps, std)[None, :]


@triton.jit(do_not_specialize=["tokens", "side"])
def clip_normalize_fwd_kernel(
    x_ptr,  # [B*N, C]
    mean_ptr,  # [C] float32, for standardize
    std_ptr,  # [C] float32, for standardize
    y_ptr,  # [B*M, C]
    tokens,  # B*M
    side,
    channels,  # C
    eps,
    MODE: tl.constexpr,
    INVERSE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two, >= C
):
    # int64: token * channels can pass 2**31.
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < channels)[None, :]
    first = _first_token(token, side, POOL)
    p = _pooled(x_ptr, first, inside, d, side, channels, POOL)
    if MODE == "standardize":
        mean = tl.load(mean_ptr + d, mask=d < channels, other=0.0)[None, :]
        std = _spread(std_ptr, d, channels, eps)
        y = p * std + mean if INVERSE else (p - mean) / std
    else:
        centered, factor, _ = _center_and_factor(p, inside, channels, eps, MODE)
        y = centered * factor[:, None]
    at = token[:, None] * channels + d[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "side"])
def clip_normalize_bwd_kernel(
    grad_ptr,  # [B*M, C]
    x_ptr,  # [B*N, C]
    std_ptr,  # [C] float32, for standardize
    d_x_ptr,  # [B*N, C]
    tokens,  # B*M
    side,
    channels,  # C
    eps,
    MODE: tl.constexpr,
    INVERSE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < channels)[None, :]
    first = _first_token(token, side, POOL)
    at = token[:, None] * channels + d[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MODE == "standardize":
        std = _spread(std_ptr, d, channels, eps)
        d_p = grad * std if INVERSE else grad / std
    else:
        p = _pooled(x_ptr, first, inside, d, side, channels, POOL)
        centered, factor, clamped = _center_and_factor(p, inside, channels, eps, MODE)
        y = centered * factor[:, None]
        along = tl.sum(grad * y, axis=1)
        if MODE == "layer":
            mean_grad = (tl.sum(grad, axis=1) / channels)[:, None]
            d_p = (grad - mean_grad - y * (along / channels)[:, None]) * factor[:, None]
        else:
            d_p = tl.where(clamped[:, None], grad, grad - y * along[:, None]) * factor[:, None]
    d_x = (d_p / (POOL * POOL)).to(d_x_ptr.dtype.element_ty)
    to = d_x_ptr + first[:, None] * channels + d[None, :]
    for row in range(POOL):
        for column in tl.static_range(POOL):
            tl.store(to + (row * side + column).to(tl.int64) * channels, d_x, mask=inside)


def forward(
    x: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    pool: int,
    eps: float,
    inverse: bool,
) -> Tensor:
    """Pool and normalize `x`.

    Args:
        x: tokens, [B, N, C], contiguous; float32, bfloat16 or float16.
        mean: [C] float32, contiguous, for "standardize" only.
        std: as `mean`.
        mode: "l2", "layer" or "standardize".
        pool: side of the pooled squares.
        eps: as the op says.
        inverse: undo "standardize".

    Returns:
        [B, N / pool**2, C], dtype of `x`; computed in float32. Arguments were checked by
        clipflow.ops.
    """
    B, N, C = x.shape
    M = N // (pool * pool)
    y = x.new_empty(B, M, C)
    if y.numel() == 0:
        return y
    rows, block, warps = _configs.tile("clip_normalize", C, x.get_device())
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        clip_normalize_fwd_kernel[(triton.cdiv(B * M, rows),)](
            x, mean, std, y, B * M, math.isqrt(N), C, eps,
            MODE=mode, INVERSE=inverse, POOL=pool,
            BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, std: Tensor | None, mode: str, pool: int, eps: float, inverse: bool
) -> Tensor:
    """The gradient of `forward` at `x`, for the output's gradient `grad`.

    Args:
        grad: [B, N / pool**2, C], contiguous, dtype of `x`.
        x, std, mode, pool, eps, inverse: as in `forward`.

    Returns:
        d_x, [B, N, C], contiguous.
    """
    _, N, C = x.shape
    d_x = torch.empty_like(x)
    if x.numel() == 0:
        return d_x
    tokens = grad.numel() // C
    rows, block, warps = _configs.tile("clip_normalize_backward", C, x.get_device())
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        clip_normalize_bwd_kernel[(triton.cdiv(tokens, rows),)](
            grad, x, std, d_x, tokens, math.isqrt(N), C, eps,
            MODE=mode, INVERSE=inverse, POOL=pool,
            BLOCK_ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return d_x
