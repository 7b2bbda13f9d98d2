"""Triton kernels for qk_norm_rope; the op is defined in clipflow/ops/qk_norm_rope.py.

    n = (x - mean) * rstd * weight + bias,   y_i = n_i cos - n_j sin,   y_j = n_j cos + n_i sin

Source: Su et al., "RoFormer" (2021), section 3.4.2, for the rotation; Henry et al., "Query-Key
Normalization for Transformers" (2020), for the normalization.

A program holds whole groups in registers, as pairs (i, j): several heads, or all heads of one
token. Bytes moved: forward reads x and writes y; backward reads grad and x and writes d_x, and
float32 partial sums of the parameters' gradients, one row a program, which PyTorch adds up.
Nothing is chosen by the batch size and no atomics are used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape suffixes: B = batch, L = tokens of a sample, H = heads, K = width of a head, P = pairs, K/2.

# do_not_specialize below names the numbers that change from batch to batch and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.


@triton.jit
def _load_pairs(base_ptr, row_at, width, real, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    """Return (i, j), [ROWS, P] float32 each, of the rows that begin at `row_at`; 0 outside."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(base_ptr + row_at + d, mask=real & (d < width), other=0.0).to(tl.float32)
        i, j = tl.split(tl.reshape(both, (both.shape[0], PAIRS, 2)))
    else:
        p = tl.arange(0, PAIRS)[None, :]
        inside = real & (p < width // 2)
        i = tl.load(base_ptr + row_at + p, mask=inside, other=0.0).to(tl.float32)
        j = tl.load(base_ptr + row_at + width // 2 + p, mask=inside, other=0.0).to(tl.float32)
    return i, j


@triton.jit
def _store_pairs(
    base_ptr, row_at, i, j, width, real, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr
):
    element = base_ptr.dtype.element_ty
    if INTERLEAVED:
        d = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(i, j), (i.shape[0], 2 * PAIRS))
        tl.store(base_ptr + row_at + d, both.to(element), mask=real & (d < width))
    else:
        p = tl.arange(0, PAIRS)[None, :]
        inside = real & (p < width // 2)
        tl.store(base_ptr + row_at + p, i.to(element), mask=inside)
        tl.store(base_ptr + row_at + width // 2 + p, j.to(element), mask=inside)


@triton.jit
def _group_mean(value, count, ACROSS: tl.constexpr):
    """Mean over each row, or over the whole tile, as [ROWS, 1] or [1, 1]."""
    total = tl.sum(value, axis=1, keep_dims=True)
    if ACROSS:
        total = tl.sum(total, axis=0, keep_dims=True)
    return total / count


@triton.jit
def _normalize(
    i, j, inside, count, eps, LAYER: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr
):
    """Return (xhat_i, xhat_j, rstd); all is zero outside."""
    if NORM:
        if LAYER:
            mean = _group_mean(i + j, count, ACROSS)
            i = tl.where(inside, i - mean, 0.0)
            j = tl.where(inside, j - mean, 0.0)
        rstd = tl.rsqrt(_group_mean(i * i + j * j, count, ACROSS) + eps)
        # Rows past the end have no variance: with eps = 0 their rstd is infinite.
        i = tl.where(inside, i * rstd, 0.0)
        j = tl.where(inside, j * rstd, 0.0)
    else:
        rstd = 1.0
    return i, j, rstd


@triton.jit
def _places(program, tokens, heads, ROWS: tl.constexpr, ACROSS: tl.constexpr):
    """Return (row of B*L*H, token of B*L, head, whether it exists) of a tile's rows, [ROWS, 1]."""
    r = tl.arange(0, ROWS)[:, None]
    if ACROSS:
        token = program.to(tl.int64) + tl.zeros_like(r)
        head = r
        real = (head < heads) & (token < tokens)
    else:
        row = program.to(tl.int64) * ROWS + r
        token = row // heads
        head = (row - token * heads).to(tl.int32)
        real = token < tokens
    return token * heads + head, token, head, real


@triton.jit
def _angles(cos_ptr, sin_ptr, token, pairs, real, PAIRS: tl.constexpr):
    p = tl.arange(0, PAIRS)[None, :]
    inside = real & (p < pairs)
    cos = tl.load(cos_ptr + token * pairs + p, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * pairs + p, mask=inside, other=0.0)
    return cos, sin


@triton.jit(do_not_specialize=["tokens", "tokens_per_sample"])
def qk_norm_rope_fwd_kernel(
    x_ptr,  # [B, L, H, K]
    weight_ptr,  # [K] or [H, K]
    bias_ptr,  # [K] or [H, K]
    cos_ptr,  # [L, P] float32
    sin_ptr,  # [L, P] float32
    y_ptr,  # [B, L, H, K], contiguous
    tokens,  # B*L
    tokens_per_sample,  # L
    heads,  # H
    width,  # K
    sample_stride,
    token_stride,
    head_stride,
    eps,
    NORM: tl.constexpr,
    LAYER: tl.constexpr,
    ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,  # heads of a program; all of a token's where ACROSS
    PAIRS: tl.constexpr,  # power of two, >= P
):
    row, token, head, real = _places(tl.program_id(0), tokens, heads, ROWS, ACROSS)
    sample = token // tokens_per_sample
    place = token - sample * tokens_per_sample
    inside = real & (tl.arange(0, PAIRS)[None, :] < width // 2)

    at = sample * sample_stride + place * token_stride + head.to(tl.int64) * head_stride
    i, j = _load_pairs(x_ptr, at, width, real, INTERLEAVED, PAIRS)
    count = width * heads if ACROSS else width
    i, j, _ = _normalize(i, j, inside, count, eps, LAYER, NORM, ACROSS)

    group_at = head * width if ACROSS else head * 0
    if WEIGHT:
        weight_i, weight_j = _load_pairs(weight_ptr, group_at, width, real, INTERLEAVED, PAIRS)
        i, j = i * weight_i, j * weight_j
    if BIAS:
        bias_i, bias_j = _load_pairs(bias_ptr, group_at, width, real, INTERLEAVED, PAIRS)
        i, j = i + bias_i, j + bias_j
    if ROPE:
        cos, sin = _angles(cos_ptr, sin_ptr, place, width // 2, real, PAIRS)
        i, j = i * cos - j * sin, j * cos + i * sin
    _store_pairs(y_ptr, row * width, i, j, width, real, INTERLEAVED, PAIRS)


@triton.jit(do_not_specialize=["partial_size", "tokens", "tokens_per_sample"])
def qk_norm_rope_bwd_kernel(
    grad_ptr,  # [B, L, H, K], contiguous
    x_ptr,  # [B, L, H, K]
    weight_ptr,  # [K] or [H, K]
    cos_ptr,  # [L, P] float32
    sin_ptr,  # [L, P] float32
    d_x_ptr,  # [B, L, H, K], contiguous
    partial_ptr,  # [2, programs, group] float32: this program's part of d_weight, then of d_bias
    partial_size,  # programs * group
    tokens,  # B*L
    tokens_per_sample,  # L
    heads,  # H
    width,  # K
    sample_stride,
    token_stride,
    head_stride,
    eps,
    NORM: tl.constexpr,
    LAYER: tl.constexpr,
    ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROPE: tl.constexpr,
    SUMS: tl.constexpr,  # whether the parameters' gradients are wanted
    STEPS: tl.constexpr,  # tiles that one program walks
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :] < width // 2
    count = width * heads if ACROSS else width
    head = tl.arange(0, ROWS)[:, None]
    group_at = head * width if ACROSS else head * 0
    every = (head < heads) if ACROSS else (head < ROWS)
    if WEIGHT:
        weight_i, weight_j = _load_pairs(weight_ptr, group_at, width, every, INTERLEAVED, PAIRS)

    d_weight_i = tl.zeros((ROWS, PAIRS), tl.float32)
    d_weight_j = tl.zeros((ROWS, PAIRS), tl.float32)
    d_bias_i = tl.zeros((ROWS, PAIRS), tl.float32)
    d_bias_j = tl.zeros((ROWS, PAIRS), tl.float32)
    for step in range(STEPS):
        row, token, h, real = _places(program * STEPS + step, tokens, heads, ROWS, ACROSS)
        sample = token // tokens_per_sample
        place = token - sample * tokens_per_sample
        inside = real & pair
        at = sample * sample_stride + place * token_stride + h.to(tl.int64) * head_stride
        g_i, g_j = _load_pairs(grad_ptr, row * width, width, real, INTERLEAVED, PAIRS)
        if ROPE:  # back by the same angle
            cos, sin = _angles(cos_ptr, sin_ptr, place, width // 2, real, PAIRS)
            g_i, g_j = g_i * cos + g_j * sin, g_j * cos - g_i * sin
        if NORM:
            i, j = _load_pairs(x_ptr, at, width, real, INTERLEAVED, PAIRS)
            i, j, rstd = _normalize(i, j, inside, count, eps, LAYER, NORM, ACROSS)
            if SUMS:
                d_weight_i += g_i * i
                d_weight_j += g_j * j
                d_bias_i += g_i
                d_bias_j += g_j
            if WEIGHT:
                g_i, g_j = g_i * weight_i, g_j * weight_j
            product = _group_mean(g_i * i + g_j * j, count, ACROSS)
            if LAYER:
                mean = _group_mean(g_i + g_j, count, ACROSS)
                g_i, g_j = g_i - mean, g_j - mean
            g_i, g_j = (g_i - i * product) * rstd, (g_j - j * product) * rstd
        _store_pairs(d_x_ptr, row * width, g_i, g_j, width, real, INTERLEAVED, PAIRS)

    if SUMS:
        if not ACROSS:
            d_weight_i = tl.sum(d_weight_i, axis=0, keep_dims=True)
            d_weight_j = tl.sum(d_weight_j, axis=0, keep_dims=True)
            d_bias_i = tl.sum(d_bias_i, axis=0, keep_dims=True)
            d_bias_j = tl.sum(d_bias_j, axis=0, keep_dims=True)
            row_at = tl.zeros((1, 1), tl.int64) + program * width
            one = row_at >= 0
        else:
            row_at = program * heads * width + group_at
            one = every
        _store_pairs(partial_ptr, row_at, d_weight_i, d_weight_j, width, one, INTERLEAVED, PAIRS)
        _store_pairs(
            partial_ptr + partial_size, row_at, d_bias_i, d_bias_j, width, one, INTERLEAVED, PAIRS
        )


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    interleaved: bool,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Normalize and rotate queries or keys.

    Args:
        x: [B, L, H, K], K contiguous; float32, bfloat16 or float16.
        weight: [K], or [H * K] with `across_heads`, contiguous; None is 1.
        bias: as `weight`; None is 0.
        cos: float32 [L, K/2], contiguous, or None.
        sin: as `cos`.
        norm: "none", "rms" or "layer".
        across_heads: normalize over all heads of a token.
        interleaved: turn neighbors, not halves.
        eps: added to the mean square or the variance.
        out: [B, L, H, K], contiguous, to write into; None for a new tensor.

    Returns:
        [B, L, H, K], contiguous, dtype of `x`. Arguments were checked by clipflow.ops.
    """
    B, L, H, K = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if x.numel() == 0:
        return y
    rows, pairs, warps = _tile(H, K, across_heads)
    tiles = B * L if across_heads else triton.cdiv(B * L * H, rows)
    with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
        qk_norm_rope_fwd_kernel[(tiles,)](
            x, weight, bias, cos, sin, y, B * L, L, H, K, *x.stride()[:3], eps,
            NORM=norm != "none", LAYER=norm == "layer", ACROSS=across_heads,
            INTERLEAVED=interleaved, WEIGHT=weight is not None, BIAS=bias is not None,
            ROPE=cos is not None, ROWS=rows, PAIRS=pairs, num_warps=warps,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    interleaved: bool,
    eps: float,
    *,
    parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `forward` for the output's gradient `grad` [B, L, H, K], contiguous.

    Args:
        parameters: whether the gradients of weight and bias are wanted.

    Returns:
        (d_x [B, L, H, K], d_weight, d_bias), the last two float32 [K] or [H * K], or None. Sums are
        taken in a fixed order, so two calls give the same bits.
    """
    B, L, H, K = x.shape
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    group = H * K if across_heads else K
    rows, pairs, warps = _tile(H, K, across_heads)
    tiles = B * L if across_heads else triton.cdiv(B * L * H, rows)
    steps = min(16, triton.next_power_of_2(triton.cdiv(max(L, 1), 16))) if parameters else 1
    programs = triton.cdiv(tiles, steps)
    partial = torch.empty(2, programs * parameters, group, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device(x.get_device()):  # the CPU's -1, in the interpreter, does nothing
            qk_norm_rope_bwd_kernel[(programs,)](
                grad, x, weight, cos, sin, d_x, partial, programs * group,
                B * L, L, H, K, *x.stride()[:3], eps,
                NORM=norm != "none", LAYER=norm == "layer", ACROSS=across_heads,
                INTERLEAVED=interleaved, WEIGHT=weight is not None, ROPE=cos is not None,
                SUMS=parameters, STEPS=steps, ROWS=rows, PAIRS=pairs, num_warps=warps,
            )  # fmt: skip
    if not parameters:
        return d_x, None, None
    d_weight, d_bias = partial.sum(1, dtype=torch.float64).float()
    return d_x, d_weight, d_bias


def _tile(heads: int, width: int, across_heads: bool) -> tuple[int, int, int]:
    """Heads and pairs that a program holds, and its warps: about 8 values a lane.

    Depends on H and K alone: a group is summed in the same order in every batch.
    """
    pairs = triton.next_power_of_2(width // 2)
    rows = triton.next_power_of_2(heads) if across_heads else max(1, 512 // pairs)
    return rows, pairs, min(16, max(1, rows * pairs // 128))
