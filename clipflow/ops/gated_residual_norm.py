"""The end of one transformer branch and the beginning of the next, in one pass.

    h[b, l, :] = x[b, l, :] + (gate[b, :] + gate_table) * y[b, l, :]
    normed[b, l, :] = norm(h[b, l, :]) * (1 + scale[b, :] + table[1]) + shift[b, :] + table[0]

where norm is LayerNorm without parameters or RMSNorm, of h as it is stored.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN;
the tables are adaLN-single of Chen et al., "PixArt-alpha" (2023), section 2.3.
"""

# Shape suffixes: B = batch, L = tokens, D = channels, S = rows of modulation.

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import check_no_gradient, check_results
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


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    *,
    gate_table: Tensor | None = None,
    table: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the gated branch `y` to the stream `x`; return the stream and its modulated norm.

    Args:
        x: the residual stream, tokens [B, L, D] or an image [B, H, W, D]; float32, bfloat16 or
            float16 (float64 on CPU and eager).
        y: what the branch computed, as `x`.
        gate: multiplies `y`, [B, D] or in the shape of `x`, dtype and device of `x`; None for ones.
            May be a strided view, such as one of `modulation.chunk(6, dim=-1)`.
        shift: added after normalization, in the shape of `scale`, as `gate`; None for none.
        scale: multiplies as (1 + scale), [B, D] or in the shape of `x`; `gate` has its shape.
        gate_table: [D], as `x`: added to every `gate`; None for zeros, and where there is no gate.
        table: [2, D], as `x`: its rows are added to every `shift` and `scale`; None for zeros.
        norm: "layer" (zero mean, unit variance) or "rms" (unit mean square).
        eps: added to the variance or mean square, in squared units of `x`.
        out: (h, normed), tensors to write the results into and to return, like `x`, contiguous,
            apart from each other and from all inputs, but that `h` may be `x` itself, in place,
            and `normed` may be `y`; None for new ones. "eager" computes elsewhere and copies.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        (h, normed), each in the shape and dtype of `x`, contiguous. Computed in float32; `normed`
        is of `h` as rounded to its dtype. Differentiable in all tensors; gradients are
        deterministic.

    Raises:
        ShapeError: `x` has neither 3 nor 4 dimensions, or another tensor has not its shape above.
        TypeError: a dtype or device is not one of the above.
        ValueError: there is no such norm, a `gate_table` without a `gate`, or `out` is not two
            contiguous tensors.
        RuntimeError: `out` is given where a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    check_call("gated_residual_norm", x, scale, shift, gate, y, norm=norm)
    if gate_table is not None:
        check_vector("gated_residual_norm", "gate_table", gate_table, x)
        if gate is None:
            raise ValueError(
                "gated_residual_norm: gate_table must be None without a gate, got a tensor"
            )
    if table is not None:
        check_vector("gated_residual_norm", "table", table, x, rows=(2,))
    if out is not None:
        check_results("gated_residual_norm", out, (x, x), x.device)
        check_no_gradient("gated_residual_norm", x, y, gate, shift, scale, gate_table, table, *out)
    name = OP.select(x, backend)
    if name == "eager":
        found = reference(
            x, y, gate, shift, scale, gate_table=gate_table, table=table, norm=norm, eps=eps
        )
        return into(out, found)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or y.requires_grad
        or scale.requires_grad
        or (gate is not None and gate.requires_grad)
        or (shift is not None and shift.requires_grad)
        or (gate_table is not None and gate_table.requires_grad)
        or (table is not None and table.requires_grad)
    ):
        return _GatedResidualNorm.apply(
            x, y, gate, shift, scale, gate_table, table, norm == "rms", eps, name
        )
    return OP.backends[name].forward(
        x, y, gate, shift, scale, gate_table, table, norm == "rms", eps, out
    )


def reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    *,
    gate_table: Tensor | None = None,
    table: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    branch = y.to(wide(x))
    if gate is not None:
        branch = per_token(_gate(gate, gate_table), x) * branch
    h = (x.to(wide(x)) + branch).to(x.dtype).contiguous()
    normed = modulated_norm(h, shift, scale, None, table, norm, eps)
    return h, normed.to(x.dtype).contiguous()


def _gate(gate: Tensor, gate_table: Tensor | None) -> Tensor:
    gate = gate.to(wide(gate))
    return gate if gate_table is None else gate + gate_table.to(gate.dtype)


class _GatedResidualNorm(torch.autograd.Function):
    """Gradients of every backend that autograd cannot look into."""

    @staticmethod
    def forward(x, y, gate, shift, scale, gate_table, table, rms, eps, backend):
        return OP.backends[backend].forward(x, y, gate, shift, scale, gate_table, table, rms, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, y, gate, shift, scale, gate_table, table, ctx.rms, ctx.eps, ctx.backend = inputs
        y = None if gate is None else y
        ctx.save_for_backward(output[0], y, gate, shift, scale, gate_table, table)

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, d_h: Tensor, d_normed: Tensor):
        h, y, gate, shift, scale, gate_table, table = ctx.saved_tensors
        factor = None
        if gate is not None:
            y, factor = y.contiguous(), _gate(gate, gate_table).flatten(0, -2).contiguous()
        d_x, d_y, d_factor, d_offset, d_gain = OP.backends[ctx.backend].backward(
            d_h.contiguous(), d_normed.contiguous(), h, y, factor, gain(scale, None, table),
            ctx.rms, ctx.eps,
        )  # fmt: skip
        d_shift, d_scale, _, d_table = modulation_grads(d_offset, d_gain, shift, scale, None, table)
        d_gate = d_gate_table = None
        if gate is None:
            d_y = d_x
        else:
            d_gate = d_factor.to(gate.dtype).view(gate.shape)
        if gate_table is not None:
            d_gate_table = d_factor.sum(0).to(gate.dtype)
        return d_x, d_y, d_gate, d_shift, d_scale, d_gate_table, d_table, None, None, None


def _native(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    gate_table: Tensor | None,
    table: Tensor | None,
    rms: bool,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    gate_table = gate_table if gate_table is None else gate_table.contiguous()
    operands = (
        x.contiguous(), y.contiguous(), rows(gate), rows(shift), rows(scale), gate_table,
        rows(table), rms, eps,
    )  # fmt: skip
    if out is None:
        return _forward_op(*operands)
    _out_op(*operands, *out)
    return tuple(out)


def _native_backward(
    d_h: Tensor,
    d_normed: Tensor,
    h: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gain: Tensor,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward_op(d_h, d_normed, h, y, gate, gain, rms, eps)


def _triton(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    gate_table: Tensor | None,
    table: Tensor | None,
    rms: bool,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    from clipflow.kernels.triton import gated_residual_norm as kernel  # an optional dependency

    gate_table = gate_table if gate_table is None else gate_table.contiguous()
    return kernel.forward(
        x.contiguous(), y.contiguous(), rows(gate), rows(shift), rows(scale), gate_table,
        rows(table), rms, eps, out,
    )  # fmt: skip


def _triton_backward(
    d_h: Tensor,
    d_normed: Tensor,
    h: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gain: Tensor,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from clipflow.kernels.triton import gated_residual_norm as kernel  # an optional dependency

    return kernel.backward(d_h, d_normed, h, y, gate, gain, rms, eps)


def _fake(x, y, gate, shift, scale, gate_table, table, rms, eps) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(
    d_h, d_normed, h, y, gate, gain, rms, eps
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_y = h.new_empty(0 if gate is None else h.shape)
    d_gate = gain.new_empty(0 if gate is None else gain.shape)
    return h.new_empty(h.shape), d_y, d_gate, *(gain.new_empty(gain.shape) for _ in range(2))


def _case(
    *shape: int,
    norm: str = "layer",
    gate: bool = True,
    shift: bool = True,
    tables: bool = False,
    tokenwise: bool = False,
) -> Case:
    B, D = shape[0], shape[-1]
    parts = {"x": True, "y": True, "gate": gate, "shift": shift, "scale": True}
    parts |= {"gate_table": tables and gate, "table": tables}
    names = tuple(name for name, given in parts.items() if given)

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        made = {name: torch.randn(shape, device=device, dtype=dtype) for name in ("x", "y")}
        form = shape[:-1] if tokenwise else (B,)
        all_three = torch.randn(*form, 3 * D, device=device, dtype=dtype)
        made["shift"], made["scale"], made["gate"] = all_three.chunk(3, dim=-1)
        made["gate_table"] = torch.randn(D, device=device, dtype=dtype)
        made["table"] = torch.randn(2, 2 * D, device=device, dtype=dtype)[:, :D]
        return tuple(made[name] for name in names)

    options = {"norm": norm} if norm != "layer" else {}
    options |= {} if gate else {"gate": None}
    options |= {} if shift else {"shift": None}
    form = f"B{B}-L{shape[1]}-D{D}" if len(shape) == 3 else "x".join(map(str, shape))
    traits = [norm] * (norm != "layer") + ["no_gate"] * (not gate) + ["no_shift"] * (not shift)
    traits += ["tables"] * tables + ["tokenwise"] * tokenwise
    return Case(
        name="-".join([form, *traits]),
        inputs=inputs,
        options=lambda device: dict(options),
        shared=frozenset(i for i, name in enumerate(names) if name in ("gate_table", "table")),
        names=() if gate and shift and not tables else names,
    )


def _any_case(rng: random.Random) -> Case:
    D = rng.choice([rng.randint(1, 140), rng.randint(1, 8192)])
    most = max(1, 2**14 // D)
    shape = (rng.randint(0, 3), rng.randint(0, most), D)
    if rng.random() < 0.3:
        H = rng.randint(1, most)
        shape = (shape[0], H, rng.randint(0, most // H), D)
    flip = lambda: rng.random() < 0.5  # noqa: E731
    return _case(
        *shape,
        norm=rng.choice(["layer", "rms"]),
        gate=rng.random() < 0.7,
        shift=flip(),
        tables=flip(),
        tokenwise=rng.random() < 0.3,
    )


# x, y [..., D], contiguous; gate, shift, scale [S, D], table [2, D]: contiguous rows.
SCHEMA = (
    "(Tensor x, Tensor y, Tensor? gate, Tensor? shift, Tensor scale, Tensor? gate_table,"
    " Tensor? table, bool rms, float eps) -> (Tensor, Tensor)"
)

OP = register(
    Op(
        name="gated_residual_norm",
        schemas={
            "gated_residual_norm": SCHEMA,
            "gated_residual_norm_out": out_schema(SCHEMA, "h", "normed"),
            # gate (its table included) and gain: [S, D], contiguous, float32 (float64 for
            # float64). Returns d_x, d_y, d_gate, d_offset, d_gain, the last three like gain;
            # without a gate, y is None, and d_y, which is d_x, and d_gate are empty.
            "gated_residual_norm_backward": "(Tensor d_h, Tensor d_normed, Tensor h, Tensor? y,"
            " Tensor? gate, Tensor gain, bool rms, float eps)"
            " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        },
        fakes={
            "gated_residual_norm": _fake,
            "gated_residual_norm_out": fake_out,
            "gated_residual_norm_backward": _fake_backward,
        },
        public=gated_residual_norm,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": native("gated_residual_norm", _native, _native_backward),
            "triton": triton(_triton, _triton_backward),
        },
        order=("native", "triton", "eager"),
        # One token; odd sizes that leave a masked tail; the embedded model's block; then each form.
        cases=(
            _case(1, 1, 8),
            _case(3, 17, 77, tables=True),
            _case(2, 64, 192),
            _case(3, 9, 45, norm="rms", gate=False, shift=False),
            _case(2, 5, 3, 40, norm="rms", shift=False),
            _case(2, 6, 72, tokenwise=True, tables=True),
            _case(2, 9, 40, gate=False, tables=True),
        ),
        timed=tuple(_case(2, L, D) for D in (192, 1152, 1792, 2240) for L in (64, 256, 1024, 2048)),
        of_length=lambda L: _case(2, L, 24),
        any_case=_any_case,
        traffic="read x and y, write h and normed; modulation is B * D values each, or B * L * D",
        flops=lambda x, *_, **__: 10 * x.numel(),
        in_place=frozenset({0, 1}),
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.gated_residual_norm.default
_out_op = torch.ops.clipflow.gated_residual_norm_out.default
_backward_op = torch.ops.clipflow.gated_residual_norm_backward.default
