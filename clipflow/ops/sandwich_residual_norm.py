"""Sandwich norm: normalize a branch, gate it into the stream, and normalize for the next branch.

    h[b, l, :] = x[b, l, :] + tanh(gate[b, :]) * rms(y[b, l, :]) * weight
    normed[b, l, :] = rms(h[b, l, :]) * next_weight * (1 + scale[b, :])

where rms(v) = v / sqrt(mean(v * v) + eps), and h is taken as it is stored.

Source: Zhuo et al., "Lumina-Next" (2024), section 2.1, sandwich normalization; BLIP3-o's generator.
"""

# Shape suffixes: B = batch, L = tokens, D = channels.

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import check_no_gradient, check_results, check_shape
from clipflow.modulation import (
    check_call,
    check_vector,
    gain,
    modulated_norm,
    modulation_grads,
    per_token,
    rows,
    wide,
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


def sandwich_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-5,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the normalized, gated branch `y` to the stream `x`; return the stream and its norm.

    Args:
        x: the residual stream, tokens [B, L, D] or an image [B, H, W, D]; float32, bfloat16 or
            float16 (float64 on CPU and eager).
        y: what the branch computed, as `x`.
        gate: its tanh multiplies the normalized `y`, [B, D], dtype and device of `x`. May be a
            strided view, such as one of `modulation.chunk(4, dim=-1)`.
        scale: multiplies the next norm as (1 + scale), as `gate`.
        weight: of the norm of `y`, [D], as `x`; None for ones.
        next_weight: of the norm of `h`, [D], as `x`; None for ones.
        eps: added to the mean squares, in squared units of `x`.
        out: (h, normed), tensors to write the results into and to return, like `x`, contiguous,
            apart from each other and from all inputs, but that `h` may be `x` itself, in place,
            and `normed` may be `y`; None for new ones. "eager" computes elsewhere and copies.
        backend: "auto", or one of "eager", "native".

    Returns:
        (h, normed), each in the shape and dtype of `x`, contiguous. Computed in float32; `normed`
        is of `h` as rounded to its dtype. Differentiable in all tensors; gradients are
        deterministic.

    Raises:
        ShapeError: `x` has neither 3 nor 4 dimensions, or another tensor has not its shape above.
        TypeError: a dtype or device is not one of the above.
        ValueError: `out` is not two contiguous tensors.
        RuntimeError: `out` is given where a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    if scale.ndim != 2:
        check_shape("sandwich_residual_norm", "scale", scale, (x.shape[0], x.shape[-1]))
    check_call("sandwich_residual_norm", x, scale, None, gate, y)
    if weight is not None:
        check_vector("sandwich_residual_norm", "weight", weight, x)
    if next_weight is not None:
        check_vector("sandwich_residual_norm", "next_weight", next_weight, x)
    if out is not None:
        check_results("sandwich_residual_norm", out, (x, x), x.device)
        check_no_gradient("sandwich_residual_norm", x, y, gate, scale, weight, next_weight, *out)
    name = OP.select(x, backend)
    if name == "eager":
        found = reference(x, y, gate, scale, weight=weight, next_weight=next_weight, eps=eps)
        return into(out, found)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or y.requires_grad
        or gate.requires_grad
        or scale.requires_grad
        or (weight is not None and weight.requires_grad)
        or (next_weight is not None and next_weight.requires_grad)
    ):
        return _SandwichResidualNorm.apply(x, y, gate, scale, weight, next_weight, eps, name)
    return OP.backends[name].forward(x, y, gate, scale, weight, next_weight, eps, out)


def reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    next_weight: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    dtype = wide(x)
    weight = None if weight is None else weight.to(dtype)
    branch = F.rms_norm(y.to(dtype), y.shape[-1:], weight, eps)
    branch = per_token(gate.to(dtype).tanh(), x) * branch
    h = (x.to(dtype) + branch).to(x.dtype).contiguous()
    normed = modulated_norm(h, None, scale, next_weight, None, "rms", eps)
    return h, normed.to(x.dtype).contiguous()


class _SandwichResidualNorm(torch.autograd.Function):
    """Gradients of every backend that autograd cannot look into."""

    @staticmethod
    def forward(x, y, gate, scale, weight, next_weight, eps, backend):
        return OP.backends[backend].forward(x, y, gate, scale, weight, next_weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, y, gate, scale, weight, next_weight, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(output[0], y, gate, scale, weight, next_weight)

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, d_h: Tensor, d_normed: Tensor):
        h, y, gate, scale, weight, next_weight = ctx.saved_tensors
        tanh = gate.to(wide(gate)).tanh()
        factor = tanh if weight is None else tanh * weight.to(tanh.dtype)
        d_x, d_y, d_factor, d_gain = OP.backends[ctx.backend].backward(
            d_h.contiguous(), d_normed.contiguous(), h, y.contiguous(), factor.contiguous(),
            gain(scale, next_weight, None), ctx.eps,
        )  # fmt: skip
        _, d_scale, d_next_weight, _ = modulation_grads(
            d_gain, d_gain, None, scale, next_weight, None
        )
        d_weight = None
        d_tanh = d_factor
        if weight is not None:
            d_weight = (d_factor * tanh).sum(0).to(gate.dtype)
            d_tanh = d_factor * weight.to(tanh.dtype)
        d_gate = (d_tanh * (1 - tanh * tanh)).to(gate.dtype)
        return d_x, d_y, d_gate, d_scale, d_weight, d_next_weight, None, None


def _native(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    weight = weight if weight is None else weight.contiguous()
    next_weight = next_weight if next_weight is None else next_weight.contiguous()
    operands = (x.contiguous(), y.contiguous(), rows(gate), rows(scale), weight, next_weight, eps)
    if out is None:
        return _forward_op(*operands)
    _out_op(*operands, *out)
    return tuple(out)


def _native_backward(
    d_h: Tensor, d_normed: Tensor, h: Tensor, y: Tensor, gate: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_op(d_h, d_normed, h, y, gate, gain, eps)


def _triton(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    from clipflow.kernels.triton import sandwich_residual_norm as kernel  # an optional dependency

    weight = weight if weight is None else weight.contiguous()
    next_weight = next_weight if next_weight is None else next_weight.contiguous()
    operands = (x.contiguous(), y.contiguous(), rows(gate), rows(scale), weight, next_weight, eps)
    return kernel.forward(*operands, out)


def _triton_backward(
    d_h: Tensor, d_normed: Tensor, h: Tensor, y: Tensor, gate: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from clipflow.kernels.triton import sandwich_residual_norm as kernel  # an optional dependency

    return kernel.backward(d_h, d_normed, h, y, gate, gain, eps)


def _fake(x, y, gate, scale, weight, next_weight, eps) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(d_h, d_normed, h, y, gate, gain, eps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x, d_y = h.new_empty(h.shape), h.new_empty(h.shape)
    return d_x, d_y, gain.new_empty(gain.shape), gain.new_empty(gain.shape)


def _case(*shape: int, weight: bool = True, next_weight: bool = True) -> Case:
    B, D = shape[0], shape[-1]
    parts = {"x": True, "y": True, "gate": True, "scale": True}
    parts |= {"weight": weight, "next_weight": next_weight}
    names = tuple(name for name, given in parts.items() if given)

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        made = {name: torch.randn(shape, device=device, dtype=dtype) for name in ("x", "y")}
        both = torch.randn(B, 2 * D, device=device, dtype=dtype)
        made["gate"], made["scale"] = both.chunk(2, dim=-1)
        for name in ("weight", "next_weight"):
            made[name] = torch.randn(D, device=device, dtype=dtype)
        return tuple(made[name] for name in names)

    form = f"B{B}-L{shape[1]}-D{D}" if len(shape) == 3 else "x".join(map(str, shape))
    traits = ["no_weight"] * (not weight) + ["no_next_weight"] * (not next_weight)
    return Case(
        name="-".join([form, *traits]),
        inputs=inputs,
        shared=frozenset(range(4, len(names))),
        names=names,
    )


def _any_case(rng: random.Random) -> Case:
    D = rng.choice([rng.randint(1, 140), rng.randint(1, 8192)])
    most = max(1, 2**14 // D)
    shape = (rng.randint(0, 3), rng.randint(0, most), D)
    if rng.random() < 0.3:
        H = rng.randint(1, most)
        shape = (shape[0], H, rng.randint(0, most // H), D)
    return _case(*shape, weight=rng.random() < 0.5, next_weight=rng.random() < 0.5)


def _of_length(L: int) -> Case:
    whole = _case(2, L, 24, weight=False, next_weight=False)
    return Case(name=whole.name, inputs=whole.inputs)


# x, y [..., D], contiguous; gate and scale [B, D]: contiguous rows.
SCHEMA = (
    "(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor? weight, Tensor? next_weight,"
    " float eps) -> (Tensor, Tensor)"
)

OP = register(
    Op(
        name="sandwich_residual_norm",
        schemas={
            "sandwich_residual_norm": SCHEMA,
            "sandwich_residual_norm_out": out_schema(SCHEMA, "h", "normed"),
            # gate = tanh(gate) * weight, gain = next_weight * (1 + scale): [B, D], contiguous,
            # float32 (float64 for float64). Returns d_x, d_y, d_gate, d_gain.
            "sandwich_residual_norm_backward": "(Tensor d_h, Tensor d_normed, Tensor h, Tensor y,"
            " Tensor gate, Tensor gain, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
        },
        fakes={
            "sandwich_residual_norm": _fake,
            "sandwich_residual_norm_out": fake_out,
            "sandwich_residual_norm_backward": _fake_backward,
        },
        public=sandwich_residual_norm,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": native("sandwich_residual_norm", _native, _native_backward),
            "triton": triton(_triton, _triton_backward),
        },
        order=("native", "triton", "eager"),
        # One token; odd sizes that leave a masked tail; the embedded model's block; then each form.
        cases=(
            _case(1, 1, 8),
            _case(3, 17, 77),
            _case(2, 64, 192),
            _case(2, 9, 45, weight=False),
            _case(2, 5, 3, 40, next_weight=False),
        ),
        timed=tuple(_case(2, L, D) for D in (192, 1152, 1792, 2240) for L in (64, 256, 1024, 2048)),
        of_length=_of_length,
        any_case=_any_case,
        traffic="read x and y, write h and normed; modulation is B * D values each",
        flops=lambda x, *_, **__: 12 * x.numel(),
        in_place=frozenset({0, 1}),
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.sandwich_residual_norm.default
_out_op = torch.ops.clipflow.sandwich_residual_norm_out.default
_backward_op = torch.ops.clipflow.sandwich_residual_norm_backward.default
