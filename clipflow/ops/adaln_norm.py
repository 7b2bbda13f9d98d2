"""Adaptive layer norm: normalize tokens, then scale and shift them per sample.

    y[b, l, :] = layer_norm(x[b, l, :]) * (1 + scale[b, :]) + shift[b, :]

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN.
"""

# Shape suffixes: B = batch, L = tokens, D = channels.

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import check_dims, check_floating, check_like, check_shape
from clipflow.registry import Case, Op, eager, native, register, triton


def adaln_norm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """Layer-normalize `x` over channels and modulate it with one (shift, scale) pair per sample.

    Args:
        x: tokens, [B, L, D]; float32, bfloat16 or float16 (float64 on CPU and eager).
        shift: added after normalization, [B, D], same dtype and device as `x`. May be a strided
            view, such as one of `table.chunk(6, dim=-1)`.
        scale: multiplies as (1 + scale), [B, D], as `shift`.
        eps: added to the variance, in squared units of `x`.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        [B, L, D], contiguous, dtype of `x`. Statistics and modulation are computed in float32.
        Differentiable in `x`, `shift` and `scale`; gradients are deterministic.

    Raises:
        ShapeError: `x` is not [B, L, D], or `shift` or `scale` is not [B, D].
        TypeError: a dtype or device is not one of the above.
        BackendUnavailable: the named backend cannot run this call.
    """
    _check(x, shift, scale)
    name = OP.select(x, backend)
    if name == "eager":
        return reference(x, shift, scale, eps)
    if torch.is_grad_enabled() and (x.requires_grad or shift.requires_grad or scale.requires_grad):
        return _AdaLNNorm.apply(x, shift, scale, eps, name)
    return OP.backends[name].forward(x, shift, scale, eps)


def _check(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    check_dims("adaln_norm", "x", x, "[B, L, D]")
    check_floating("adaln_norm", "x", x)
    B, _, D = x.shape
    check_shape("adaln_norm", "shift", shift, (B, D))
    check_shape("adaln_norm", "scale", scale, (B, D))
    check_like("adaln_norm", "shift", shift, "x", x)
    check_like("adaln_norm", "scale", scale, "x", x)


def reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (normed * (1 + scale[:, None, :].to(wide)) + shift[:, None, :].to(wide)).to(x.dtype)


class _AdaLNNorm(torch.autograd.Function):
    """Gradients of every backend that autograd cannot look into."""

    @staticmethod
    def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str) -> Tensor:
        return OP.backends[backend].forward(x, shift, scale, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, _, scale, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        d_x, d_shift, d_scale = OP.backends[ctx.backend].backward(grad, x, scale, ctx.eps)
        return d_x, d_shift, d_scale, None, None


def _rows(modulation: Tensor) -> Tensor:
    """`modulation` [B, D] with contiguous rows; the stride from row to row stays free."""
    return modulation if modulation.stride(1) == 1 else modulation.contiguous()


def _native(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _forward_op(x.contiguous(), _rows(shift), _rows(scale), eps)


def _native_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_op(grad.contiguous(), x.contiguous(), _rows(scale), eps)


def _triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    from clipflow.kernels.triton import adaln_norm as kernel  # Triton is an optional dependency

    return kernel.forward(x.contiguous(), _rows(shift), _rows(scale), eps)


def _triton_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from clipflow.kernels.triton import adaln_norm as kernel  # Triton is an optional dependency

    return kernel.backward(grad.contiguous(), x.contiguous(), _rows(scale), eps)


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _case(B: int, L: int, D: int) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.randn(B, L, D, device=device, dtype=dtype)
        shift, scale = torch.randn(B, 2 * D, device=device, dtype=dtype).chunk(2, dim=-1)
        return x, shift, scale

    return Case(name=f"B{B}-L{L}-D{D}", inputs=inputs)


def _any_case(rng: random.Random) -> Case:
    D = rng.choice([rng.randint(1, 140), rng.randint(1, 8192)])
    return _case(rng.randint(0, 3), rng.randint(0, max(1, 2**15 // D)), D)


OP = register(
    Op(
        name="adaln_norm",
        schemas={
            "adaln_norm": "(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor",
            "adaln_norm_backward": "(Tensor grad, Tensor x, Tensor scale, float eps)"
            " -> (Tensor, Tensor, Tensor)",
        },
        fakes={"adaln_norm": _fake, "adaln_norm_backward": _fake_backward},
        public=adaln_norm,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": native("adaln_norm", _native, _native_backward),
            "triton": triton(_triton, _triton_backward),
        },
        order=("native", "triton", "eager"),
        # One token; odd sizes that leave a masked tail; the embedded model's block.
        cases=(
            _case(1, 1, 8),
            _case(3, 17, 77),
            _case(2, 64, 192),
        ),
        timed=tuple(_case(2, L, D) for D in (192, 1152, 1792, 2240) for L in (64, 256, 1024, 2048)),
        of_length=lambda L: _case(2, L, 24),
        any_case=_any_case,
        traffic="read x, write y; shift and scale are B * D values each",
        flops=lambda x, *_, **__: 8 * x.numel(),
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.adaln_norm.default
_backward_op = torch.ops.clipflow.adaln_norm_backward.default
