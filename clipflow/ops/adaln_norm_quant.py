"""Adaptive layer norm that emits 8-bit values and a scale per token for the next product.

    y = norm(x) * weight * (1 + scale + table[1]) + shift + table[0], as adaln_norm
    scales[b, l] = max |y[b, l, :]| / most,   values = round(y / scales), half to even

where most is 127 for int8 and 448 for float8_e4m3fn, whose own rounding takes the place of round.

Source: per-token symmetric quantization of Dettmers et al., "LLM.int8()" (2022), section 2.1, and
Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
"""

# Shape suffixes: B = batch, L = tokens, D = channels, S = rows of modulation.

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from clipflow.errors import check_no_gradient, check_results
from clipflow.modulation import (
    check_call,
    check_vector,
    modulated_norm,
    rows,
)
from clipflow.registry import (
    Case,
    Implementation,
    Op,
    eager,
    fake_out,
    into,
    native,
    out_schema,
    register,
    triton,
)

MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST_SCALE = torch.finfo(torch.float32).tiny


def adaln_norm_quant(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    table: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype = torch.int8,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalize and modulate `x` as `adaln_norm` does, and quantize each token symmetrically.

    Args:
        x: tokens [B, L, D] or an image [B, H, W, D]; float32, bfloat16 or float16 (float64 on CPU
            and eager).
        shift: added after normalization, [B, D] or in the shape of `x`, dtype and device of `x`;
            None for none.
        scale: multiplies as (1 + scale), as `shift`.
        weight: of the norm, [D], as `x`; None for ones.
        table: [2, D], as `x`: its rows are added to every `shift` and `scale`; None for zeros.
        norm: "layer" (zero mean, unit variance) or "rms" (unit mean square).
        eps: added to the variance or mean square, in squared units of `x`.
        dtype: torch.int8 or torch.float8_e4m3fn.
        out: (values, scales), tensors to write the results into and to return, of their shapes,
            dtypes and device, contiguous, apart from all inputs; None for new ones. "eager"
            computes elsewhere and copies.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        (values, scales): `values` in the shape of `x` and in `dtype`, contiguous; `scales`, a
        float32 for each token, [B, L] or [B, H, W]. values * scales is adaln_norm(x). Scales are at
        least 1.2e-38, so that a token of zeros is zeros. A token with an infinity or NaN has the
        scale NaN. Computed in float32, y included: it is not rounded to the dtype of `x`. Not
        differentiable.

    Raises:
        ShapeError: `x` has neither 3 nor 4 dimensions, or another tensor has not its shape above.
        TypeError: a dtype or device is not one of the above.
        ValueError: there is no such norm, or `out` is not two contiguous tensors.
        RuntimeError: `out` is given where a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    check_call("adaln_norm_quant", x, scale, shift, norm=norm)
    if weight is not None:
        check_vector("adaln_norm_quant", "weight", weight, x)
    if table is not None:
        check_vector("adaln_norm_quant", "table", table, x, rows=(2,))
    if dtype not in MOST:
        raise TypeError(
            f"adaln_norm_quant: dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype}"
        )
    if out is not None:
        wanted = ((x.shape, dtype), (x.shape[:-1], torch.float32))
        check_results("adaln_norm_quant", out, wanted, x.device)
        check_no_gradient("adaln_norm_quant", x, shift, scale, weight, table)
    name = OP.select(x, backend, dtype)
    if name == "eager":
        found = reference(
            x, shift, scale, weight=weight, table=table, norm=norm, eps=eps, dtype=dtype
        )
        return into(out, found)
    return OP.backends[name].forward(x, shift, scale, weight, table, norm == "rms", eps, dtype, out)


@torch.no_grad()
def reference(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    table: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """The meaning of the op, in float32 (float64 inputs stay float64, but for the scales)."""
    y = modulated_norm(x, shift, scale, weight, table, norm, eps)
    largest = y.abs().amax(-1, keepdim=True)
    scales = (largest / MOST[dtype]).clamp_min(LEAST_SCALE)
    scales = scales.masked_fill(largest == torch.inf, torch.nan)
    values = y / scales
    values = values.round().to(dtype) if dtype == torch.int8 else values.to(dtype)
    return values.contiguous(), scales.squeeze(-1).float().contiguous()


@torch.no_grad()
def _truth(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    table: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """What the values and scales stand for."""
    return modulated_norm(x, shift, scale, weight, table, norm, eps)


def _decoded(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values, scales = output
    return values.float() * scales[..., None]


def _native(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
    rms: bool,
    eps: float,
    dtype: torch.dtype,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    weight = weight if weight is None else weight.contiguous()
    operands = (x.contiguous(), rows(shift), rows(scale), weight, rows(table), rms, eps, dtype)
    if out is None:
        return _forward_op(*operands)
    _out_op(*operands, *out)
    return tuple(out)


def _native_implementation() -> Implementation:
    whole = native("adaln_norm_quant", _native)

    def refusal(x: Tensor, dtype: torch.dtype = torch.int8, *_: object) -> str | None:
        if x.is_cpu and dtype != torch.int8:
            return "emits int8 alone on the CPU"
        return whole.refusal(x)

    return dataclasses.replace(whole, refusal=refusal)


def _triton(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
    rms: bool,
    eps: float,
    dtype: torch.dtype,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    from clipflow.kernels.triton import adaln_norm_quant as kernel  # an optional dependency

    weight = weight if weight is None else weight.contiguous()
    operands = (x.contiguous(), rows(shift), rows(scale), weight, rows(table), rms, eps, dtype)
    return kernel.forward(*operands, out)


def _fake(x, shift, scale, weight, table, rms, eps, dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


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
    "(Tensor x, Tensor? shift, Tensor scale, Tensor? weight, Tensor? table, bool rms, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor)"
)

OP = register(
    Op(
        name="adaln_norm_quant",
        schemas={
            "adaln_norm_quant": SCHEMA,
            "adaln_norm_quant_out": out_schema(SCHEMA, "values", "scales"),
        },
        fakes={"adaln_norm_quant": _fake, "adaln_norm_quant_out": fake_out},
        public=adaln_norm_quant,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": _native_implementation(),
            "triton": triton(_triton),
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
        ),
        timed=tuple(_case(2, L, D) for D in (192, 1152, 1792, 2240) for L in (64, 256, 1024, 2048)),
        of_length=lambda L: _case(2, L, 24),
        any_case=_any_case,
        traffic="read x, write values and scales; shift and scale are B * D values each",
        flops=lambda x, *_, **__: 11 * x.numel(),
        differentiable=False,
        truth=_truth,
        decoded=_decoded,
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.adaln_norm_quant.default
_out_op = torch.ops.clipflow.adaln_norm_quant_out.default
