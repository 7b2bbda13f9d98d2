"""ReLU linear attention: one K x K state per sample and head instead of N x N weights.

    S = sum_j relu(k_j) v_j^T,  z = sum_j relu(k_j),  y_i = relu(q_i) S / (relu(q_i) . z + eps)

Source: Katharopoulos et al., "Transformers are RNNs" (2020), section 3.2; with ReLU as in Xie et
al., "SANA" (2024), section 2.2, and Cai et al., "EfficientViT" (2023), section 3.1 (DC-AE).
"""

# Shape suffixes: B = batch, N = tokens, H = heads, K = head width.

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import (
    check_dims,
    check_floating,
    check_like,
    check_no_gradient,
    check_result,
    check_shape,
)
from clipflow.registry import (
    Case,
    Op,
    eager,
    fake_out,
    into,
    native,
    out_schema,
    register,
    triton,
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-15,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every token to all tokens of its sample and head with weights relu(q) . relu(k).

    Args:
        q: queries, [B, N, H, K]; float32, bfloat16 or float16 (float64 on CPU and eager). Any
            strides do; only where the last dimension is not contiguous, a copy is made. Views of
            one packed projection are fine: SANA's `qkv.unflatten(-1, (3, H, K)).unbind(2)`, or
            DC-AE's groups of 96 channels, `x.unflatten(-1, (H, 3, 32)).unbind(3)`.
        k: keys, as `q`.
        v: values, as `q`.
        eps: added to the sum of a token's weights. A token with no positive weight gives 0.
        out: a tensor to write the result into and to return, of its shape, dtype and device,
            contiguous, apart from all inputs; None for a new one. "eager" computes elsewhere and
            copies.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        [B, N, H, K], contiguous, dtype of `v`. The state and all sums are float32, over chunks of
        tokens in one fixed order. Differentiable in all three; gradients are deterministic.

    Raises:
        ShapeError: `q` is not [B, N, H, K], or `k` or `v` has another shape.
        TypeError: a dtype or device is not one of the above.
        ValueError: `out` is not contiguous.
        RuntimeError: `out` is given where a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    _check(q, k, v)
    if out is not None:
        check_result("linear_attention", "out", out, v.shape, v.dtype, v.device)
        check_no_gradient("linear_attention", q, k, v, out)
    name = OP.select(q, backend)
    if name == "eager":
        return into(out, reference(q, k, v, eps))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _LinearAttention.apply(q, k, v, eps, name)
    return OP.backends[name].forward(q, k, v, eps, out)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_dims("linear_attention", "q", q, "[B, N, H, K]")
    check_floating("linear_attention", "q", q)
    shape = q.shape
    check_shape("linear_attention", "k", k, shape)
    check_shape("linear_attention", "v", v, shape)
    check_like("linear_attention", "k", k, "q", q)
    check_like("linear_attention", "v", v, "q", q)


def reference(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-15) -> Tensor:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v = (t.transpose(1, 2).to(wide) for t in (q, k, v))  # [B, H, N, K]
    q, k = F.relu(q), F.relu(k)
    state = k.transpose(-1, -2) @ v  # [B, H, K, K]
    weight = q @ k.sum(dim=-2).unsqueeze(-1)  # [B, H, N, 1]
    y = (q @ state) / (weight + eps)
    return y.transpose(1, 2).to(dtype).contiguous()


class _LinearAttention(torch.autograd.Function):
    """Gradients of every backend that autograd cannot look into."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, eps: float, backend: str) -> Tensor:
        return OP.backends[backend].forward(q, k, v, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        q, k, v, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(q, k, v)

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, grad: Tensor):
        d_q, d_k, d_v = OP.backends[ctx.backend].backward(grad, *ctx.saved_tensors, ctx.eps)
        return d_q, d_k, d_v, None, None


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` with contiguous heads; all other strides stay free."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _native(q: Tensor, k: Tensor, v: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    operands = (_rows(q), _rows(k), _rows(v), eps)
    if out is None:
        return _forward_op(*operands)
    _out_op(*operands, out)
    return out


def _native_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: with p = relu(q), n = p S, d = p . z + eps and y = n / d,

    d_n = grad / d,  d_p = d_n S^T - (d_n S^T . p / d) z,  d_S = p^T d_n,  d_z = sum of d_d p.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grad, p, r, w = (t.transpose(1, 2).to(wide) for t in (grad, q, k, v))  # [B, H, N, K]
    p, r = F.relu(p), F.relu(r)
    state = r.transpose(-1, -2) @ w
    z = r.sum(dim=-2).unsqueeze(-1)  # [B, H, K, 1]
    rate = 1 / (p @ z + eps)  # [B, H, N, 1]
    d_n = grad * rate
    d_p = d_n @ state.transpose(-1, -2)
    d_weight = -(d_p * p).sum(dim=-1, keepdim=True) * rate
    d_p = d_p + d_weight * z.transpose(-1, -2)
    d_state = p.transpose(-1, -2) @ d_n
    d_z = p.transpose(-1, -2) @ d_weight  # [B, H, K, 1]
    d_r = w @ d_state.transpose(-1, -2) + d_z.transpose(-1, -2)
    d_v = r @ d_state
    d_q, d_k = d_p.masked_fill(p <= 0, 0), d_r.masked_fill(r <= 0, 0)
    return tuple(t.to(q.dtype).transpose(1, 2) for t in (d_q, d_k, d_v))


def _triton(q: Tensor, k: Tensor, v: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    from clipflow.kernels.triton import linear_attention as kernel  # Triton is optional

    return kernel.forward(_rows(q), _rows(k), _rows(v), eps, out)


def _triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from clipflow.kernels.triton import linear_attention as kernel  # Triton is optional

    return kernel.backward(_rows(grad), _rows(q), _rows(k), _rows(v), eps)


def _fake(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return v.new_empty(v.shape)


def _case(B: int, N: int, H: int, K: int, *, form: str = "packed") -> Case:
    """`form`: how q, k, v lie in memory: "packed" [3, H, K], "grouped" [H, 3, K] or "apart"."""

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if form == "apart":
            return tuple(torch.randn(B, N, H, K, device=device, dtype=dtype) for _ in range(3))
        x = torch.randn(B, N, 3 * H * K, device=device, dtype=dtype)
        if form == "grouped":
            return x.unflatten(-1, (H, 3, K)).unbind(3)
        return x.unflatten(-1, (3, H, K)).unbind(2)

    return Case(name=f"B{B}-N{N}-H{H}-K{K}-{form}", inputs=inputs)


def _any_case(rng: random.Random) -> Case:
    K = rng.choice([16, 32, 64, 72, 112, 128, rng.randint(4, 160)])
    H = rng.randint(1, max(1, min(70, 2**13 // K)))
    # Of one token the gradients of q and k are 0, and what comes out is rounding: no measure.
    N = rng.choice([0, *[rng.randint(2, max(2, 2**15 // (H * K)))] * 9])
    form = rng.choice(["packed", "grouped", "apart"])
    return _case(rng.randint(0, 3), N, H, K, form=form)


SCHEMA = "(Tensor q, Tensor k, Tensor v, float eps) -> Tensor"

OP = register(
    Op(
        name="linear_attention",
        schemas={"linear_attention": SCHEMA, "linear_attention_out": out_schema(SCHEMA, "out")},
        fakes={"linear_attention": _fake, "linear_attention_out": fake_out},
        public=linear_attention,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": native("linear_attention", _native, _native_backward),
            "triton": triton(_triton, _triton_backward),
        },
        order=("native", "triton", "eager"),
        # Few tokens; odd sizes in every dimension; the embedded model's block; DC-AE's groups;
        # several chunks of tokens; wide heads.
        cases=(
            _case(2, 5, 2, 16),
            _case(3, 67, 3, 21, form="apart"),
            _case(2, 64, 6, 32),
            _case(2, 100, 3, 32, form="grouped"),
            _case(1, 600, 2, 32, form="apart"),
            _case(2, 33, 2, 112),
        ),
        timed=(
            _case(2, 64, 6, 32, form="apart"),
            _case(2, 256, 36, 32, form="apart"),
            *(_case(2, N, 70, 32, form="apart") for N in (64, 256, 1024)),
            _case(2, 256, 70, 32),
            _case(1, 256, 64, 32, form="grouped"),
            _case(1, 1024, 64, 32, form="grouped"),
            _case(1, 4096, 32, 32, form="grouped"),
        ),
        of_length=lambda N: _case(2, N, 3, 16),
        any_case=_any_case,
        traffic="read q, k, v, write y",
        flops=lambda q, *_, **__: 4 * q.numel() * q.shape[-1],
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.linear_attention.default
_out_op = torch.ops.clipflow.linear_attention_out.default
