"""Adaptive layer norm: normalize tokens, then scale and shift them per sample or per token.

    y[b, l, :] = norm(x[b, l, :]) * weight * (1 + scale[b, :] + table[1]) + shift[b, :] + table[0]

where norm is LayerNorm without parameters or RMSNorm.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN;
the table is adaLN-single of Chen et al., "PixArt-alpha" (2023), section 2.3; the weight is that of
Lumina-Next (2024).
"""

# Shape suffixes: B = batch, L = tokens, D = channels, S = rows of modulation.

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import check_no_gradient, check_result
from clipflow.modulation import (
    check_call,
    check_vector,
    gain,
    modulated_norm,
    modulation_grads,
    rows,
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


def adaln_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    table: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalize `x` over channels and modulate it with a (shift, scale) pair per sample or token.

    Args:
        x: tokens [B, L, D], or an image [B, H, W, D] such as `image.permute(0, 2, 3, 1)`, which
            costs no copy where `image` is channels-last; float32, bfloat16 or float16 (float64 on
            CPU and eager).
        shift: added after normalization, [B, D] or in the shape of `x`, dtype and device of `x`;
            None for none. May be a strided view, such as one of `modulation.chunk(6, dim=-1)`.
        scale: multiplies as (1 + scale), as `shift`.
        weight: of the norm, [D], as `x`; None for ones.
        table: [2, D], as `x`: its rows are added to every `shift` and `scale`; None for zeros.
        norm: "layer" (zero mean, unit variance) or "rms" (unit mean square).
        eps: added to the variance or mean square, in squared units of `x`.
        out: a tensor to write the result into and to return, of its shape, dtype and device,
            contiguous, apart from all inputs; None for a new one. "eager" computes elsewhere and
            copies.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        The shape of `x`, contiguous, dtype of `x`. Statistics and modulation are computed in
        float32. Differentiable in all tensors; gradients are deterministic.

    Raises:
        ShapeError: `x` has neither 3 nor 4 dimensions, or another tensor has not its shape above.
        TypeError: a dtype or device is not one of the above.
        ValueError: there is no such norm, or `out` is not contiguous.
        RuntimeError: `out` is given where a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    check_call("adaln_norm", x, scale, shift, norm=norm)
    if weight is not None:
        check_vector("adaln_norm", "weight", weight, x)
    if table is not None:
        check_vector("adaln_norm", "table", table, x, rows=(2,))
    if out is not None:
        check_result("adaln_norm", "out", out, x.shape, x.dtype, x.device)
        check_no_gradient("adaln_norm", x, shift, scale, weight, table, out)
    name = OP.select(x, backend)
    if name == "eager":
        return into(out, reference(x, shift, scale, weight=weight, table=table, norm=norm, eps=eps))
    if torch.is_grad_enabled() and (
        x.requires_grad
        or scale.requires_grad
        or (shift is not None and shift.requires_grad)
        or (weight is not None and weight.requires_grad)
        or (table is not None and table.requires_grad)
    ):
        return _AdaLNNorm.apply(x, shift, scale, weight, table, norm == "rms", eps, name)
    return OP.backends[name].forward(x, shift, scale, weight, table, norm == "rms", eps, out)


def reference(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    table: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    y = modulated_norm(x, shift, scale, weight, table, norm, eps)
    return y.to(x.dtype).contiguous()


class _AdaLNNorm(torch.autograd.Function):
    """Gradients of every backend that autograd cannot look into."""

    @staticmethod
    def forward(x, shift, scale, weight, table, rms, eps, backend) -> Tensor:
        return OP.backends[backend].forward(x, shift, scale, weight, table, rms, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.rms, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, grad: Tensor):
        x, shift, scale, weight, table = ctx.saved_tensors
        d_x, d_offset, d_gain = OP.backends[ctx.backend].backward(
            grad.contiguous(), x.contiguous(), gain(scale, weight, table), ctx.rms, ctx.eps
        )
        grads = modulation_grads(d_offset, d_gain, shift, scale, weight, table)
        return d_x, *grads, None, None, None


def _native(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
    rms: bool,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    weight = weight if weight is None else weight.contiguous()
    operands = (x.contiguous(), rows(shift), rows(scale), weight, rows(table), rms, eps)
    if out is None:
        return _forward_op(*operands)
    _out_op(*operands, out)
    return out


def _native_backward(
    grad: Tensor, x: Tensor, gain: Tensor, rms: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_op(grad, x, gain, rms, eps)


def _triton(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
    rms: bool,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    from clipflow.kernels.triton import adaln_norm as kernel  # Triton is an optional dependency

    weight = weight if weight is None else weight.contiguous()
    operands = (x.contiguous(), rows(shift), rows(scale), weight, rows(table))
    return kernel.forward(*operands, rms, eps, out)


def _triton_backward(
    grad: Tensor, x: Tensor, gain: Tensor, rms: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from clipflow.kernels.triton import adaln_norm as kernel  # Triton is an optional dependency

    return kernel.backward(grad, x, gain, rms, eps)


def _fake(x, shift, scale, weight, table, rms, eps) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad, x, gain, rms, eps) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gain.new_empty(gain.shape), gain.new_empty(gain.shape)


def _case(
    *shape: int,
    norm: str = "layer",
    shift: bool = True,
    weight: bool = False,
    table: bool = False,
    tokenwise: bool = False,
) -> Case:
    B, D = shape[0], shape[-1]
    parts = {"shift": shift, "scale": True, "weight": weight, "table": table}
    names = ("x", *(name for name, given in parts.items() if given))

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        made = {"x": torch.randn(shape, device=device, dtype=dtype)}
        form = shape[:-1] if tokenwise else (B,)
        both = torch.randn(*form, 2 * D, device=device, dtype=dtype)
        made["shift"], made["scale"] = both.chunk(2, dim=-1)
        made["weight"] = torch.randn(D, device=device, dtype=dtype)
        made["table"] = torch.randn(2, 2 * D, device=device, dtype=dtype)[:, :D]
        return tuple(made[name] for name in names)

    options = {"norm": norm} if norm != "layer" else {}
    options |= {} if shift else {"shift": None}
    form = f"B{B}-L{shape[1]}-D{D}" if len(shape) == 3 else "x".join(map(str, shape))
    traits = [norm] * (norm != "layer") + ["no_shift"] * (not shift) + ["weight"] * weight
    traits += ["table"] * table + ["tokenwise"] * tokenwise
    return Case(
        name="-".join([form, *traits]),
        inputs=inputs,
        options=lambda device: dict(options),
        shared=frozenset(i for i, name in enumerate(names) if name in ("weight", "table")),
        names=() if names == ("x", "shift", "scale") else names,
    )


def _any_case(rng: random.Random) -> Case:
    D = rng.choice([rng.randint(1, 140), rng.randint(1, 8192)])
    most = max(1, 2**15 // D)
    shape = (rng.randint(0, 3), rng.randint(0, most), D)
    if rng.random() < 0.3:
        H = rng.randint(1, most)
        shape = (shape[0], H, rng.randint(0, most // H), D)
    flip = lambda: rng.random() < 0.5  # noqa: E731
    return _case(
        *shape,
        norm=rng.choice(["layer", "rms"]),
        shift=flip(),
        weight=flip(),
        table=flip(),
        tokenwise=rng.random() < 0.3,
    )


# x [..., D], contiguous; shift and scale [S, D], table [2, D]: contiguous rows.
SCHEMA = (
    "(Tensor x, Tensor? shift, Tensor scale, Tensor? weight, Tensor? table, bool rms, float eps)"
    " -> Tensor"
)

OP = register(
    Op(
        name="adaln_norm",
        schemas={
            "adaln_norm": SCHEMA,
            "adaln_norm_out": out_schema(SCHEMA, "out"),
            # gain [S, D], contiguous, float32 (float64 for float64), as are d_offset and d_gain,
            # the sums of grad and grad * norm(x) over the tokens of each row of modulation.
            "adaln_norm_backward": "(Tensor grad, Tensor x, Tensor gain, bool rms, float eps)"
            " -> (Tensor, Tensor, Tensor)",
        },
        fakes={
            "adaln_norm": _fake,
            "adaln_norm_out": fake_out,
            "adaln_norm_backward": _fake_backward,
        },
        public=adaln_norm,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": native("adaln_norm", _native, _native_backward),
            "triton": triton(_triton, _triton_backward),
        },
        order=("native", "triton", "eager"),
        # One token; odd sizes that leave a masked tail; the embedded model's block; then each form.
        cases=(
            _case(1, 1, 8),
            _case(3, 17, 77, weight=True, table=True),
            _case(2, 64, 192),
            _case(3, 9, 45, norm="rms", shift=False, weight=True),
            _case(2, 5, 3, 40, norm="rms", table=True),
            _case(2, 6, 72, tokenwise=True, weight=True, table=True),
            _case(2, 4, 3, 24, shift=False, table=True, tokenwise=True),
        ),
        timed=tuple(_case(2, L, D) for D in (192, 1152, 1792, 2240) for L in (64, 256, 1024, 2048)),
        of_length=lambda L: _case(2, L, 24),
        any_case=_any_case,
        traffic="read x, write y; shift and scale are B * D values each, or B * L * D",
        flops=lambda x, *_, **__: 8 * x.numel(),
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.adaln_norm.default
_out_op = torch.ops.clipflow.adaln_norm_out.default
_backward_op = torch.ops.clipflow.adaln_norm_backward.default
