"""Triton kernels for ReLU linear attention; the op is defined in clipflow/ops/linear_attention.py.

    S = sum_j relu(k_j) v_j^T,  z = sum_j relu(k_j),  y_i = relu(q_i) S / d_i,
    d_i = relu(q_i) . z + eps

Source: Katharopoulos et al., "Transformers are RNNs" (2020), section 3.2; SANA (2024), section 2.2.

Tokens are cut into chunks, their number chosen by N alone. The first kernel sums the state of each
chunk; every later kernel adds up the chunks' states in order. Bytes moved: the forward reads q, k
and v and writes y once, and passes K * (K + 1) float32 a chunk; the backward reads grad, q, k twice
and v three times. No atomics: a sample's results are the same bits in every batch.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Shape suffixes: B = batch, N = tokens, H = heads, K = head width.
# Strides named *_b, *_n, *_h lead from one sample, token, head to the next.

# Triton's interpreter multiplies the bits of bfloat16 values as integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# do_not_specialize below names the numbers that change from call to call and that no load's width
# depends on: Triton would compile again for those that are 1 or a multiple of 16.
LENGTHS = ["N", "H", "chunks", "chunk_tokens"]


@triton.jit
def _dot(a, b):
    """a b in float32; float32 values are multiplied as such, not as TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dot_wide(a, b, PRECISION: tl.constexpr):
    """a b of float32 factors; "tf32x3" makes three TF32 products of each for 16-bit inputs."""
    return tl.dot(a.to(tl.float32), b, input_precision=PRECISION)


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x).to(x.dtype)  # NaN stays NaN


@triton.jit
def _load_rows(head_ptr, rows, end, row_stride, width, BLOCK_K: tl.constexpr):
    """Rows of one head, [rows, BLOCK_K]; zeros outside."""
    d = tl.arange(0, BLOCK_K)
    at = head_ptr + rows.to(tl.int64)[:, None] * row_stride + d[None, :]
    return tl.load(at, mask=(rows < end)[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def _store_rows(head_ptr, rows, end, row_stride, width, values, BLOCK_K: tl.constexpr):
    d = tl.arange(0, BLOCK_K)
    at = head_ptr + rows.to(tl.int64)[:, None] * row_stride + d[None, :]
    inside = (rows < end)[:, None] & (d < width)[None, :]
    tl.store(at, values.to(head_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_state(states_ptr, state, z, BLOCK_K: tl.constexpr):
    d = tl.arange(0, BLOCK_K)
    tl.store(states_ptr + d[:, None] * BLOCK_K + d[None, :], state)
    tl.store(states_ptr + BLOCK_K * BLOCK_K + d, z)


@triton.jit
def _sum_states(states_ptr, chunks, BLOCK_K: tl.constexpr):
    """State [K, K] and sum of keys [K] of all chunks of a head, chunk after chunk."""
    d = tl.arange(0, BLOCK_K)
    state = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    z = tl.zeros((BLOCK_K,), tl.float32)
    for _ in range(0, chunks):
        state += tl.load(states_ptr + d[:, None] * BLOCK_K + d[None, :])
        z += tl.load(states_ptr + BLOCK_K * BLOCK_K + d)
        states_ptr += (BLOCK_K + 1) * BLOCK_K
    return state, z


@triton.jit(do_not_specialize=LENGTHS)
def linear_attention_state_kernel(
    k_ptr,  # [B, N, H, K]
    v_ptr,  # [B, N, H, K]
    states_ptr,  # [B, H, chunks, BLOCK_K + 1, BLOCK_K] float32: S, then z
    k_b, k_n, k_h, v_b, v_n, v_h,
    N, H, chunks, chunk_tokens,
    width,  # K
    PRECISION: tl.constexpr,  # of products with a float32 state
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # power of two, >= K
):  # fmt: skip
    sample = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    chunk = tl.program_id(1)
    end = tl.minimum(N, (chunk + 1) * chunk_tokens)
    state = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    z = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(chunk * chunk_tokens, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        k = _relu(_load_rows(k_ptr + sample * k_b + head * k_h, rows, end, k_n, width, BLOCK_K))
        v = _load_rows(v_ptr + sample * v_b + head * v_h, rows, end, v_n, width, BLOCK_K)
        state += _dot(tl.trans(k), v)
        z += tl.sum(k.to(tl.float32), axis=0)
    at = (tl.program_id(0).to(tl.int64) * chunks + chunk) * (BLOCK_K + 1) * BLOCK_K
    _store_state(states_ptr + at, state, z, BLOCK_K)


@triton.jit(do_not_specialize=LENGTHS)
def linear_attention_fwd_kernel(
    q_ptr,  # [B, N, H, K]
    states_ptr,
    y_ptr,  # [B, N, H, K], contiguous
    q_b, q_n, q_h,
    N, H, chunks, chunk_tokens,
    width,
    eps,
    PRECISION: tl.constexpr,  # of products with a float32 state
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    chunk = tl.program_id(1)
    end = tl.minimum(N, (chunk + 1) * chunk_tokens)
    states_ptr += tl.program_id(0).to(tl.int64) * chunks * (BLOCK_K + 1) * BLOCK_K
    state, z = _sum_states(states_ptr, chunks, BLOCK_K)
    for first in range(chunk * chunk_tokens, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        q = _relu(_load_rows(q_ptr + sample * q_b + head * q_h, rows, end, q_n, width, BLOCK_K))
        weight = tl.sum(q.to(tl.float32) * z[None, :], axis=1) + eps
        y = _dot_wide(q, state, PRECISION) / weight[:, None]
        y_head = y_ptr + (sample * N * H + head) * width
        _store_rows(y_head, rows, end, H * width, width, y, BLOCK_K)


@triton.jit(do_not_specialize=LENGTHS)
def linear_attention_bwd_q_kernel(
    grad_ptr,  # [B, N, H, K]
    q_ptr,
    states_ptr,
    d_q_ptr,  # [B, N, H, K], contiguous
    d_states_ptr,  # as states: d_S, then d_z, of each chunk
    grad_b, grad_n, grad_h, q_b, q_n, q_h,
    N, H, chunks, chunk_tokens,
    width,
    eps,
    PRECISION: tl.constexpr,  # of products with a float32 state
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    chunk = tl.program_id(1)
    end = tl.minimum(N, (chunk + 1) * chunk_tokens)
    states_ptr += tl.program_id(0).to(tl.int64) * chunks * (BLOCK_K + 1) * BLOCK_K
    state, z = _sum_states(states_ptr, chunks, BLOCK_K)
    d_state = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    d_z = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(chunk * chunk_tokens, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        grad_head = grad_ptr + sample * grad_b + head * grad_h
        grad = _load_rows(grad_head, rows, end, grad_n, width, BLOCK_K).to(tl.float32)
        q = _load_rows(q_ptr + sample * q_b + head * q_h, rows, end, q_n, width, BLOCK_K)
        p = _relu(q).to(tl.float32)
        # Rows past the end have weight eps, or 0: nothing of them may be infinite.
        weight = tl.where(rows < end, tl.sum(p * z[None, :], axis=1) + eps, 1.0)
        d_n = grad / weight[:, None]
        d_p = _dot_wide(d_n, tl.trans(state), PRECISION)
        d_weight = -tl.sum(d_p * p, axis=1) / weight
        d_q = tl.where(q <= 0, 0.0, d_p + d_weight[:, None] * z[None, :])
        d_q_head = d_q_ptr + (sample * N * H + head) * width
        _store_rows(d_q_head, rows, end, H * width, width, d_q, BLOCK_K)
        d_state += _dot_wide(tl.trans(p), d_n, PRECISION)
        d_z += tl.sum(p * d_weight[:, None], axis=0)
    at = (tl.program_id(0).to(tl.int64) * chunks + chunk) * (BLOCK_K + 1) * BLOCK_K
    _store_state(d_states_ptr + at, d_state, d_z, BLOCK_K)


@triton.jit(do_not_specialize=LENGTHS)
def linear_attention_bwd_kv_kernel(
    k_ptr,
    v_ptr,
    d_states_ptr,
    d_k_ptr,  # [B, N, H, K], contiguous
    d_v_ptr,  # [B, N, H, K], contiguous
    k_b, k_n, k_h, v_b, v_n, v_h,
    N, H, chunks, chunk_tokens,
    width,
    PRECISION: tl.constexpr,  # of products with a float32 state
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    chunk = tl.program_id(1)
    end = tl.minimum(N, (chunk + 1) * chunk_tokens)
    d_states_ptr += tl.program_id(0).to(tl.int64) * chunks * (BLOCK_K + 1) * BLOCK_K
    d_state, d_z = _sum_states(d_states_ptr, chunks, BLOCK_K)
    head_at = (sample * N * H + head) * width
    for first in range(chunk * chunk_tokens, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr + sample * k_b + head * k_h, rows, end, k_n, width, BLOCK_K)
        v = _load_rows(v_ptr + sample * v_b + head * v_h, rows, end, v_n, width, BLOCK_K)
        d_k = _dot_wide(v, tl.trans(d_state), PRECISION) + d_z[None, :]
        d_k = tl.where(k <= 0, 0.0, d_k)
        _store_rows(d_k_ptr + head_at, rows, end, H * width, width, d_k, BLOCK_K)
        d_v = _dot_wide(_relu(k), d_state, PRECISION)
        _store_rows(d_v_ptr + head_at, rows, end, H * width, width, d_v, BLOCK_K)


def forward(q: Tensor, k: Tensor, v: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Attend from every token to all tokens.

    Args:
        q, k, v: [B, N, H, K], any strides but contiguous heads; float32, bfloat16 or float16.
        eps: added to the sum of a token's weights.
        out: [B, N, H, K], contiguous, to write into; None for a new tensor.

    Returns:
        [B, N, H, K], contiguous, dtype of `v`; computed in float32. Arguments were checked by
        clipflow.ops.
    """
    B, N, H, K = q.shape
    y = torch.empty(B, N, H, K, dtype=v.dtype, device=v.device) if out is None else out
    if y.numel() == 0:
        return y
    options = _tile(K, q.dtype)
    chunk_tokens, chunks = _chunks(N)
    states = _new_states(q, chunks, options["BLOCK_K"])
    with torch.cuda.device(q.get_device()):  # the CPU's -1, in the interpreter, does nothing
        linear_attention_state_kernel[(B * H, chunks)](
            k, v, states, *k.stride()[:3], *v.stride()[:3],
            N, H, chunks, chunk_tokens, K, **options,
        )  # fmt: skip
        linear_attention_fwd_kernel[(B * H, chunks)](
            q, states, y, *q.stride()[:3], N, H, chunks, chunk_tokens, K, eps, **options
        )
    return y


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` at `q`, `k`, `v` for the output's gradient `grad`.

    Args:
        grad: [B, N, H, K], any strides but contiguous heads, dtype of `q`; the rest as given to
            `forward`.

    Returns:
        (d_q, d_k, d_v), contiguous; sums are float32 and taken in a fixed order.
    """
    B, N, H, K = q.shape
    d_q, d_k, d_v = (torch.empty(B, N, H, K, dtype=q.dtype, device=q.device) for _ in range(3))
    if d_q.numel() == 0:
        return d_q, d_k, d_v
    options = _tile(K, q.dtype)
    chunk_tokens, chunks = _chunks(N)
    states = _new_states(q, chunks, options["BLOCK_K"])
    d_states = torch.empty_like(states)
    sizes = (N, H, chunks, chunk_tokens, K)
    with torch.cuda.device(q.get_device()):  # the CPU's -1, in the interpreter, does nothing
        linear_attention_state_kernel[(B * H, chunks)](
            k, v, states, *k.stride()[:3], *v.stride()[:3], *sizes, **options
        )
        linear_attention_bwd_q_kernel[(B * H, chunks)](
            grad, q, states, d_q, d_states, *grad.stride()[:3], *q.stride()[:3],
            *sizes, eps, **options,
        )  # fmt: skip
        linear_attention_bwd_kv_kernel[(B * H, chunks)](
            k, v, d_states, d_k, d_v, *k.stride()[:3], *v.stride()[:3], *sizes, **options
        )
    return d_q, d_k, d_v


def _new_states(q: Tensor, chunks: int, block_k: int) -> Tensor:
    B, _, H, _ = q.shape
    shape = (B, H, chunks, block_k + 1, block_k)
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _chunks(tokens: int) -> tuple[int, int]:
    """Tokens of a chunk, and chunks: at most 16 of them, 256 tokens or more each.

    By N alone: a sample is summed in the same order in every batch.
    """
    chunk = max(256, triton.next_power_of_2(triton.cdiv(tokens, 16)))
    return chunk, triton.cdiv(tokens, chunk)


def _tile(width: int, dtype: torch.dtype) -> dict[str, object]:
    """Configuration of every kernel, by K and dtype alone.

    Up to K = 64 no architecture from sm_80 to sm_100 spills registers or takes more than 48 KiB of
    shared memory; the published models have K = 32. Wider states need more of both.
    """
    block_k = max(16, triton.next_power_of_2(width))
    if dtype != torch.float32 and block_k <= 32:
        tile = {"BLOCK_N": 64, "num_warps": 4, "PRECISION": "tf32x3"}
    else:
        tile = {"BLOCK_N": 32, "num_warps": max(8, block_k // 8), "PRECISION": "ieee"}
    return {**tile, "BLOCK_K": block_k, "num_stages": 1}
