"""Triton kernels for softmax attention; the op is defined in clipflow/ops/dit_attention.py.

    p_ij = exp(s_ij - m_i) / t_i,  s_ij = scale * q_i . k_j,  y_i = sum_j p_ij v_j
    d_s_ij = p_ij (grad_i . v_j - grad_i . y_i)
    d_q_i = scale sum_j d_s_ij k_j,  d_k_j = scale sum_i d_s_ij q_i,  d_v_j = sum_i p_ij grad_i

with m_i the largest score of row i and t_i the sum that makes its weights add up to 1.

Source: Dao, "FlashAttention-2" (2023), section 3: blocks of scores never leave the chip; the
gradients' kernels compute them again from m and t.

Bytes moved: the forward reads q and writes y once, and reads k and v once for each BLOCK_L queries.
No atomics are used, and nothing is chosen by the batch size: a sample's results are the same bits
whatever else is in the batch. Keys past a sample's length are never read.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape suffixes: B = batch, L = queries, S = keys, H = heads, G = heads of keys, K = head width.
# Strides named *_b, *_n, *_h lead from one sample, token, head to the next.

# Triton's interpreter multiplies the bits of bfloat16 values as integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)

# do_not_specialize below names the numbers that change from call to call and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.
LENGTHS = ["L", "S", "H", "heads_a_group"]


@triton.jit
def _dot(a, b):
    """a b in float32; float32 values are multiplied as such, not as TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _exp(x):
    # Scores are subtracted before they are scaled: the largest weights keep all their bits.
    return tl.exp2(x * LOG2_E)


@triton.jit
def _load_rows(head_ptr, rows, count, row_stride, width, BLOCK_K: tl.constexpr):
    """Rows of one head, [rows, BLOCK_K]; zeros outside."""
    d = tl.arange(0, BLOCK_K)
    at = head_ptr + rows.to(tl.int64)[:, None] * row_stride + d[None, :]
    return tl.load(at, mask=(rows < count)[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def _store_rows(head_ptr, rows, count, row_stride, width, values, BLOCK_K: tl.constexpr):
    d = tl.arange(0, BLOCK_K)
    at = head_ptr + rows.to(tl.int64)[:, None] * row_stride + d[None, :]
    inside = (rows < count)[:, None] & (d < width)[None, :]
    tl.store(at, values.to(head_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _key_length(lengths_ptr, sample, S):
    length = S
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + sample).to(tl.int32)
    return length


@triton.jit(do_not_specialize=LENGTHS)
def dit_attention_fwd_kernel(
    q_ptr,  # [B, L, H, K]
    k_ptr,  # [B, S, G, K]
    v_ptr,  # [B, S, G, K]
    lengths_ptr,  # [B], or None
    y_ptr,  # [B, L, H, K], contiguous
    largest_ptr,  # [B, H, L] float32: m
    total_ptr,  # [B, H, L] float32: t
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    L, S, H,
    heads_a_group,  # H / G
    width,  # K
    scale,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,  # power of two, >= K
):  # fmt: skip
    sample = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    group = head // heads_a_group
    rows = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    length = _key_length(lengths_ptr, sample, S)
    q = _load_rows(q_ptr + sample * q_b + head * q_h, rows, L, q_n, width, BLOCK_K)
    k_head = k_ptr + sample * k_b + group * k_h
    v_head = v_ptr + sample * v_b + group * v_h

    shift = tl.zeros((BLOCK_L,), tl.float32)
    largest = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    y = tl.zeros((BLOCK_L, BLOCK_K), tl.float32)
    for first in range(0, length, BLOCK_S):
        keys = first + tl.arange(0, BLOCK_S)
        k = _load_rows(k_head, keys, length, k_n, width, BLOCK_K)
        v = _load_rows(v_head, keys, length, v_n, width, BLOCK_K)
        scores = _dot(q, tl.trans(k)) * scale
        scores = tl.where((keys < length)[None, :], scores, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # A row whose scores are all -inf so far has no number to subtract.
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        p = _exp(scores - shift[:, None])
        fade = _exp(largest - shift)
        total = total * fade + tl.sum(p, axis=1)
        y = y * fade[:, None] + _dot(p.to(v.dtype), v)
        largest = new_largest

    if length > 0:
        y = y / total[:, None]
    y_head = y_ptr + (sample * L * H + head) * width
    _store_rows(y_head, rows, L, H * width, width, y, BLOCK_K)
    row_at = tl.program_id(0).to(tl.int64) * L + rows
    tl.store(largest_ptr + row_at, shift, mask=rows < L)
    tl.store(total_ptr + row_at, total, mask=rows < L)


@triton.jit(do_not_specialize=LENGTHS)
def dit_attention_bwd_q_kernel(
    grad_ptr,  # [B, L, H, K]
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    y_ptr,  # [B, L, H, K], contiguous
    largest_ptr,  # [B, H, L] float32
    total_ptr,  # [B, H, L] float32
    dots_ptr,  # [B, H, L] float32: grad . y, written here for the next kernel
    d_q_ptr,  # [B, L, H, K], contiguous
    grad_b, grad_n, grad_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    L, S, H,
    heads_a_group,
    width,
    scale,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    group = head // heads_a_group
    rows = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    length = _key_length(lengths_ptr, sample, S)
    q = _load_rows(q_ptr + sample * q_b + head * q_h, rows, L, q_n, width, BLOCK_K)
    grad_head = grad_ptr + sample * grad_b + head * grad_h
    grad = _load_rows(grad_head, rows, L, grad_n, width, BLOCK_K)
    y_head = y_ptr + (sample * L * H + head) * width
    y = _load_rows(y_head, rows, L, H * width, width, BLOCK_K)
    dots = tl.sum(grad.to(tl.float32) * y.to(tl.float32), axis=1)
    row_at = tl.program_id(0).to(tl.int64) * L + rows
    tl.store(dots_ptr + row_at, dots, mask=rows < L)
    largest = tl.load(largest_ptr + row_at, mask=rows < L, other=0.0)
    total = tl.load(total_ptr + row_at, mask=rows < L, other=1.0)
    k_head = k_ptr + sample * k_b + group * k_h
    v_head = v_ptr + sample * v_b + group * v_h

    d_q = tl.zeros((BLOCK_L, BLOCK_K), tl.float32)
    for first in range(0, length, BLOCK_S):
        keys = first + tl.arange(0, BLOCK_S)
        k = _load_rows(k_head, keys, length, k_n, width, BLOCK_K)
        v = _load_rows(v_head, keys, length, v_n, width, BLOCK_K)
        scores = _dot(q, tl.trans(k)) * scale
        p = _exp(scores - largest[:, None]) / total[:, None]
        d_p = _dot(grad, tl.trans(v))
        d_scores = tl.where((keys < length)[None, :], p * (d_p - dots[:, None]), 0.0)
        d_q += _dot(d_scores.to(k.dtype), k)
    d_q_head = d_q_ptr + (sample * L * H + head) * width
    _store_rows(d_q_head, rows, L, H * width, width, d_q * scale, BLOCK_K)


@triton.jit(do_not_specialize=LENGTHS)
def dit_attention_bwd_kv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    largest_ptr,
    total_ptr,
    dots_ptr,
    d_k_ptr,  # [B, S, G, K], contiguous
    d_v_ptr,  # [B, S, G, K], contiguous
    grad_b, grad_n, grad_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    L, S, H,
    heads_a_group,
    width,
    scale,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    groups = H // heads_a_group
    sample = (tl.program_id(0) // groups).to(tl.int64)
    group = (tl.program_id(0) % groups).to(tl.int64)
    keys = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    length = _key_length(lengths_ptr, sample, S)
    k = _load_rows(k_ptr + sample * k_b + group * k_h, keys, length, k_n, width, BLOCK_K)
    v = _load_rows(v_ptr + sample * v_b + group * v_h, keys, length, v_n, width, BLOCK_K)
    d_k = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
    d_v = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
    blocks = tl.cdiv(L, BLOCK_L)
    # Blocks of padding alone get zeros.
    steps = tl.where(tl.program_id(1) * BLOCK_S < length, heads_a_group * blocks, 0)
    for step in range(0, steps):
        head = group * heads_a_group + step // blocks
        rows = (step % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
        q = _load_rows(q_ptr + sample * q_b + head * q_h, rows, L, q_n, width, BLOCK_K)
        grad_head = grad_ptr + sample * grad_b + head * grad_h
        grad = _load_rows(grad_head, rows, L, grad_n, width, BLOCK_K)
        row_at = (sample * H + head) * L + rows
        largest = tl.load(largest_ptr + row_at, mask=rows < L, other=0.0)
        total = tl.load(total_ptr + row_at, mask=rows < L, other=1.0)
        dots = tl.load(dots_ptr + row_at, mask=rows < L, other=0.0)
        scores = _dot(k, tl.trans(q)) * scale
        inside = (keys < length)[:, None] & (rows < L)[None, :]
        p = tl.where(inside, _exp(scores - largest[None, :]) / total[None, :], 0.0)
        d_v += _dot(p.to(grad.dtype), grad)
        d_p = _dot(v, tl.trans(grad))
        d_scores = tl.where(inside, p * (d_p - dots[None, :]), 0.0)
        d_k += _dot(d_scores.to(q.dtype), q)
    head_at = (sample * S * groups + group) * width
    _store_rows(d_k_ptr + head_at, keys, S, groups * width, width, d_k * scale, BLOCK_K)
    _store_rows(d_v_ptr + head_at, keys, S, groups * width, width, d_v, BLOCK_K)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from `q` to the keys.

    Args:
        q: [B, L, H, K], K at most 128; any strides but contiguous heads; float32, bfloat16 or
            float16.
        k: [B, S, G, K], as `q`, H a multiple of G.
        v: as `k`.
        key_lengths: [B] int32 or int64, or None.
        scale: of the scores.

    Returns:
        (y [B, L, H, K], contiguous, dtype of `q`; statistics [2, B, H, L] float32 for `backward`:
        the largest scores, and the sums of the weights). Products are float32 sums
        of the inputs' dtype, the weights rounded to it. Arguments were checked by clipflow.ops.
    """
    (B, L, H, K), S, G = q.shape, k.shape[1], k.shape[2]
    y = torch.empty(B, L, H, K, dtype=q.dtype, device=q.device)
    statistics = torch.empty(2, B, H, L, dtype=torch.float32, device=q.device)
    if y.numel() == 0:
        return y, statistics
    tile, _, _ = _tiles(K, q.dtype)
    with torch.cuda.device(q.get_device()):  # the CPU's -1, in the interpreter, does nothing
        dit_attention_fwd_kernel[(B * H, triton.cdiv(L, tile["BLOCK_L"]))](
            q, k, v, key_lengths, y, *statistics.unbind(0),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            L, S, H, H // G, K, scale, **tile,
        )  # fmt: skip
    return y, statistics


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    y: Tensor,
    statistics: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` at `q`, `k`, `v` for the output's gradient `grad`.

    Args:
        grad: [B, L, H, K], any strides but contiguous heads, dtype of `q`.
        y, statistics: what `forward` returned; the rest as given to it.

    Returns:
        (d_q, d_k, d_v), contiguous; sums are float32 and taken in a fixed order.
    """
    (B, L, H, K), S, G = q.shape, k.shape[1], k.shape[2]
    d_q = torch.empty(B, L, H, K, dtype=q.dtype, device=q.device)
    d_k = torch.empty(B, S, G, K, dtype=q.dtype, device=q.device)
    d_v = torch.empty_like(d_k)
    if d_q.numel() == 0 or d_k.numel() == 0:
        return d_q.zero_(), d_k.zero_(), d_v.zero_()
    largest, total = statistics.unbind(0)
    dots = torch.empty_like(largest)
    strides = [n for t in (grad, q, k, v) for n in t.stride()[:3]]
    _, queries, keys = _tiles(K, q.dtype)
    with torch.cuda.device(q.get_device()):  # the CPU's -1, in the interpreter, does nothing
        dit_attention_bwd_q_kernel[(B * H, triton.cdiv(L, queries["BLOCK_L"]))](
            grad, q, k, v, key_lengths, y, largest, total, dots, d_q, *strides,
            L, S, H, H // G, K, scale, **queries,
        )  # fmt: skip
        dit_attention_bwd_kv_kernel[(B * G, triton.cdiv(S, keys["BLOCK_S"]))](
            grad, q, k, v, key_lengths, largest, total, dots, d_k, d_v, *strides,
            L, S, H, H // G, K, scale, **keys,
        )  # fmt: skip
    return d_q, d_k, d_v


def _tiles(width: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Configurations of the forward, the queries' and the keys' gradient, by K and dtype alone.

    Chosen so that no architecture from sm_80 to sm_100 spills registers or takes more than 48 KiB
    of shared memory.
    """
    block_k = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:
        if block_k <= 32:
            tiles = (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)
        elif block_k == 64:
            tiles = (32, 32, 4, 1), (16, 16, 4, 1), (32, 32, 4, 1)
        else:
            tiles = (16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1)
    elif block_k <= 64:
        tiles = (64, 64, 4, 2), (32, 64, 4, 1), (32, 64, 4, 1)
    else:
        tiles = (64, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)
    names = ("BLOCK_L", "BLOCK_S", "num_warps", "num_stages")
    return tuple({**dict(zip(names, tile, strict=True)), "BLOCK_K": block_k} for tile in tiles)
