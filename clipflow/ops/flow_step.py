"""One step of a flow-matching sampler: guidance, solver update, and the model's next input.

    v = null + g * (cond - null)                                guidance, where velocity has 2B rows
    euler:     x' = x + step * v                                                step = s' - s
    heun:      x' = x + step * v, then x' = x + step * (v_1 + v_2)              step = (s' - s) / 2
    dpmpp_2m:  x_0 = x + step * v,  x' = keep * x + rest * (x_0 + gain * (x_0 - x_0_before))
               step = -s, keep = s' / s, rest = 1 - keep, gain = h / (2 * h_before)

Source: Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022); Karras et al., "Elucidating the
Design Space of Diffusion-Based Generative Models" (2022), algorithm 1; Lu et al., "DPM-Solver++"
(2022), algorithm 2, on the noise levels s of flow matching.
"""

# Shape suffixes: B = samples; the other dimensions are any, the same in all tensors.

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from clipflow.errors import (
    ShapeError,
    check_floating,
    check_like,
    check_no_gradient,
    check_results,
    check_shape,
)
from clipflow.registry import (
    Case,
    Op,
    eager,
    fake_out,
    into,
    native,
    register,
    triton,
    without_gradient,
)

SOLVERS = ("euler", "heun", "dpmpp_2m")


def flow_step(
    latents: Tensor,
    velocity: Tensor,
    previous: Tensor | None = None,
    *,
    coefficients: Sequence[float] | Tensor,
    solver: str = "euler",
    guidance: float | Tensor = 1.0,
    model_dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance the latents of a sampler by one evaluation of the model.

    Args:
        latents: x, the state, [B, ...]; float32 or float64.
        velocity: what the model predicts, [B, ...], or with guidance [2B, ...], rows [null, cond];
            float32, bfloat16 or float16 (float64 with float64 latents).
        previous: [B, ...] as `latents`: v_1 for the second stage of "heun" (`latents` are again
            those of the first), x_0_before for "dpmpp_2m"; None for "euler", for the first stage of
            "heun", and where "dpmpp_2m" takes a step of first order.
        coefficients: (step, gain, keep, rest): numbers, or a tensor [4] of float64 on the device,
            which is not read on the host; "euler" and "heun" use the first alone.
        solver: "euler", "heun" or "dpmpp_2m".
        guidance: g, a number or [B] float32, one for each sample; 1 where velocity is [B, ...].
        model_dtype: dtype of the model's input; that of `velocity` if None.
        out: tensors to write the three results into, contiguous, and to return; the first may be
            `latents` and the third `previous`. The third is left alone where nothing is kept.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        (x' as `latents`; x' as the model's next input, in `model_dtype` with the rows of
        `velocity`, so twice over with guidance; what is kept to be the next `previous`: v_1 after
        the first stage of "heun", x_0 in "dpmpp_2m", x' where nothing is). Without `out`, the
        second is the first itself where shape and dtype agree. All arithmetic has the dtype of
        `latents`, each operation of the formulas rounded for itself, in the order of the brackets,
        products before sums. Gradients exist on "eager" alone, which "auto" takes for them.

    Raises:
        ShapeError: a tensor is not of the shape above.
        TypeError: a dtype or device is not one of the above.
        ValueError: an unknown solver, `previous` with "euler", guidance without null rows, other
            than four coefficients, or `out` is not three contiguous tensors.
        RuntimeError: `out` is given where a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    _check(latents, velocity, previous, coefficients, solver, guidance)
    if model_dtype is None:
        model_dtype = velocity.dtype
    if out is not None:
        keeps = solver == "dpmpp_2m" or (solver == "heun" and previous is None)
        _check_out(out, latents, velocity, model_dtype, keeps)
        check_no_gradient("flow_step", latents, velocity, previous, *out)
        out = out if keeps else (out[0], out[1], out[0])
    gradient = torch.is_grad_enabled() and (latents.requires_grad or velocity.requires_grad)
    return OP.backends[OP.select(latents, backend, gradient)].forward(
        latents, velocity, previous, coefficients, solver, guidance, model_dtype, out
    )


def _check(
    latents: Tensor,
    velocity: Tensor,
    previous: Tensor | None,
    coefficients: Sequence[float] | Tensor,
    solver: str,
    guidance: float | Tensor,
) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"flow_step: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    dtype, shape, device = latents.dtype, latents.shape, latents.device
    if dtype is not torch.float32 and dtype is not torch.float64:
        raise TypeError(f"flow_step: latents must be float32 or float64, got {dtype}")
    if not shape:
        raise ShapeError("flow_step: latents must be [B, ...], got []")
    check_floating("flow_step", "velocity", velocity)
    if velocity.dtype is torch.float64 and dtype is not torch.float64:
        raise TypeError(
            "flow_step: velocity must be narrower than float64 with float32 latents, "
            f"got {velocity.dtype}"
        )
    if velocity.device != device:
        raise TypeError(
            f"flow_step: velocity must be on {device} as latents is, got {velocity.device}"
        )
    guided = velocity.shape != shape
    if guided and velocity.shape != (2 * shape[0], *shape[1:]):
        raise ShapeError(
            f"flow_step: velocity must be {list(shape)}, or twice as many rows, "
            f"got {list(velocity.shape)}"
        )
    if previous is not None:
        if solver == "euler":
            raise ValueError("flow_step: previous must be None with 'euler', got a tensor")
        check_shape("flow_step", "previous", previous, shape)
        check_like("flow_step", "previous", previous, "latents", latents)
    if isinstance(coefficients, Tensor):
        check_shape("flow_step", "coefficients", coefficients, (4,))
        _check_numbers("coefficients", coefficients, torch.float64, latents)
    elif len(coefficients) != 4:
        raise ValueError(f"flow_step: coefficients must be 4 numbers, got {len(coefficients)}")
    if isinstance(guidance, Tensor):
        check_shape("flow_step", "guidance", guidance, shape[:1])
        _check_numbers("guidance", guidance, torch.float32, latents)
        guidance = "[B]"
    if not guided and guidance != 1 and shape[0]:
        raise ValueError(
            f"flow_step: guidance must be 1 without null rows in velocity, got {guidance}"
        )


def _check_numbers(name: str, tensor: Tensor, dtype: torch.dtype, latents: Tensor) -> None:
    if tensor.dtype is not dtype or tensor.device != latents.device:
        raise TypeError(
            f"flow_step: {name} must be {dtype} on {latents.device}, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _check_out(
    out: tuple[Tensor, Tensor, Tensor],
    latents: Tensor,
    velocity: Tensor,
    model_dtype: torch.dtype,
    keeps: bool,
) -> None:
    state, device = (latents.shape, latents.dtype), latents.device
    wanted = (state, (velocity.shape, model_dtype), state if keeps else None)
    check_results("flow_step", out, wanted, device)


def reference(
    latents: Tensor,
    velocity: Tensor,
    previous: Tensor | None,
    coefficients: Sequence[float] | Tensor,
    solver: str,
    guidance: float | Tensor,
    model_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of the op, in the dtype of `latents`."""
    if isinstance(coefficients, Tensor):
        coefficients = coefficients.to(latents.dtype)
    step, gain, keep, rest = coefficients
    guided = velocity.shape != latents.shape
    v = velocity.to(latents.dtype)
    if guided:
        null, cond = v.chunk(2)
        if isinstance(guidance, Tensor):
            guidance = guidance.to(v.dtype).view(-1, *[1] * (v.ndim - 1))
        v = null + guidance * (cond - null)
    if solver == "dpmpp_2m":
        kept = latents + step * v
        target = kept if previous is None else kept + gain * (kept - previous)
        new = keep * latents + rest * target
    else:
        new = latents + step * (v if previous is None else previous + v)
        kept = v if solver == "heun" and previous is None else new
    model_input = new.to(model_dtype)
    return new, torch.cat([model_input, model_input]) if guided else model_input, kept


def _eager(
    latents, velocity, previous, coefficients, solver, guidance, model_dtype, out
) -> tuple[Tensor, Tensor, Tensor]:
    found = reference(latents, velocity, previous, coefficients, solver, guidance, model_dtype)
    return into(out, found)


def _native(
    latents, velocity, previous, coefficients, solver, guidance, model_dtype, out
) -> tuple[Tensor, Tensor, Tensor]:
    if latents.dtype is torch.float64 and (velocity.dtype, model_dtype) != _FLOAT64:
        return _native_float64(
            latents, velocity, previous, coefficients, solver, guidance, model_dtype, out
        )
    latents = latents if latents.is_contiguous() else latents.contiguous()
    velocity = velocity if velocity.is_contiguous() else velocity.contiguous()
    results = out or _results(latents, velocity, previous, solver, model_dtype)
    new, model_input, kept = results
    table = guidances = None
    if isinstance(coefficients, Tensor):
        table, coefficients = coefficients, (0.0, 0.0, 0.0, 0.0)
    if isinstance(guidance, Tensor):
        guidances, guidance = guidance, 1.0
    step, gain, keep, rest = coefficients
    _step_op(
        latents, velocity, previous, table, guidances, step, gain, keep, rest, guidance,
        solver == "dpmpp_2m", new, None if model_input is new else model_input,
        None if kept is new else kept,
    )  # fmt: skip
    return results


def _native_float64(
    latents, velocity, previous, coefficients, solver, guidance, model_dtype, out
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel for float64 reads and writes nothing else."""
    wide = (
        None if out is None else (out[0], torch.empty_like(velocity, dtype=latents.dtype), out[2])
    )
    new, model_input, kept = _native(
        latents, velocity.double(), previous, coefficients, solver, guidance, latents.dtype, wide
    )
    if out is None:
        return new, model_input.to(model_dtype), kept
    out[1].copy_(model_input)
    return out


def _results(latents, velocity, previous, solver, model_dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for the results of a call with contiguous `latents` and `velocity`."""
    new = torch.empty_like(latents)
    model_input = kept = new
    if model_dtype is not velocity.dtype:
        model_input = torch.empty_like(velocity, dtype=model_dtype)
    elif model_dtype is not latents.dtype or velocity.shape != latents.shape:
        model_input = torch.empty_like(velocity)
    if solver != "euler" and (previous is None or solver == "dpmpp_2m"):
        kept = torch.empty_like(latents)
    return new, model_input, kept


def _triton(
    latents, velocity, previous, coefficients, solver, guidance, model_dtype, out
) -> tuple[Tensor, Tensor, Tensor]:
    from clipflow.kernels.triton import flow_step as kernel  # Triton is an optional dependency

    latents, velocity = latents.contiguous(), velocity.contiguous()
    results = out or _results(latents, velocity, previous, solver, model_dtype)
    kernel.forward(
        latents,
        velocity,
        None if previous is None else previous.contiguous(),
        coefficients.contiguous() if isinstance(coefficients, Tensor) else coefficients,
        guidance.contiguous() if isinstance(guidance, Tensor) else guidance,
        solver,
        *results,
    )
    return results


def _case(
    shape: tuple[int, ...],
    solver: str,
    guidance: float | str,
    *,
    second: bool = False,
    on_device: bool = False,
    model_dtype: torch.dtype | None = None,
) -> Case:
    """`guidance` is a number, 1 for velocity without null rows, or "samples" for one each."""
    B = shape[0]

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        latents = torch.randn(shape, device=device, dtype=wide)
        rows = B if guidance == 1 else 2 * B
        velocity = torch.randn(rows, *shape[1:], device=device, dtype=dtype)
        return (latents, velocity, torch.randn_like(latents)) if second else (latents, velocity)

    def options(device: torch.device) -> dict[str, object]:
        chosen: dict[str, object] = {"solver": solver, "coefficients": (-0.7, 0.35, 0.8, 0.2)}
        if on_device:
            chosen["coefficients"] = torch.tensor(
                [-0.7, 0.35, 0.8, 0.2], dtype=torch.float64, device=device
            )
        chosen["guidance"] = guidance
        if guidance == "samples":
            chosen["guidance"] = 1.0 + torch.arange(B, device=device, dtype=torch.float32)
        if model_dtype is not None:
            chosen["model_dtype"] = model_dtype
        return chosen

    name = "x".join(map(str, shape)) + f"-{solver}" + ("-second" if second else "")
    name += f"-guided-{guidance}" if guidance != 1 else ""
    return Case(name=name, inputs=inputs, options=options)


def _any_case(rng: random.Random) -> Case:
    form = rng.choice(FORMS)
    guidance = rng.choice([1.0, 4.5, "samples"])
    model_dtype = rng.choice([None, torch.float32, torch.bfloat16, torch.float16])
    B, C = rng.randint(0, 5), rng.choice([rng.randint(1, 140), rng.randint(1, 6000)])
    shape = rng.choice([(B, C), (B, C, 1), (B,), (B, rng.randint(0, 3), 1 + C // 40, 5)])
    return _case(shape, form[0], guidance, second=form[1], model_dtype=model_dtype)


FORMS = (
    ("euler", False),
    ("heun", False),
    ("heun", True),
    ("dpmpp_2m", False),
    ("dpmpp_2m", True),
)
_FLOAT64 = (torch.float64, torch.float64)

OP = register(
    Op(
        name="flow_step",
        schemas={
            "flow_step": "(Tensor latents, Tensor velocity, Tensor? previous, Tensor? coefficients,"
            " Tensor? guidances, float step, float gain, float keep, float rest, float guidance,"
            " bool dpmpp_2m, Tensor(a!) new, Tensor(b!)? model_input, Tensor(c!)? kept) -> ()",
        },
        fakes={"flow_step": fake_out},
        public=flow_step,
        reference=reference,
        backends={
            "eager": eager(_eager),
            "native": without_gradient(native("flow_step", _native)),
            "triton": without_gradient(triton(_triton)),
        },
        order=("native", "triton", "eager"),
        # Every form; one value a sample, odd sizes, and the embedded model's latents.
        cases=(
            _case((1, 8), "euler", 1.0),
            _case((3, 5, 7, 11), "dpmpp_2m", "samples", second=True),
            _case((3, 77), "heun", "samples"),
            _case((3, 77), "heun", 1.0, second=True),
            _case((2, 32, 8, 8), "dpmpp_2m", 1.0, on_device=True),
            _case((2, 32, 8, 8), "euler", "samples", model_dtype=torch.bfloat16),
        ),
        timed=(
            _case((4, 32, 16, 16), "dpmpp_2m", "samples", second=True),
            *(
                _case((B, *shape), "dpmpp_2m", 4.5, second=True)
                for shape in ((32, 16, 16), (32, 32, 32), (1792, 8, 8))
                for B in (1, 8, 64)
            ),
            _case((1, 32, 32, 32), "euler", 4.5),
            _case((8, 1792, 8, 8), "euler", 4.5),
            _case((1, 32, 32, 32), "heun", 4.5),
            _case((8, 1792, 8, 8), "heun", 4.5, second=True),
        ),
        of_length=lambda n: _case((2, 4, n), "dpmpp_2m", "samples", second=True),
        any_case=_any_case,
        traffic="read latents, velocity and previous; write latents, model input and what is kept",
        flops=lambda latents, *_, **__: 12 * latents.numel(),
        differentiable=False,
        exact=True,
        in_place=frozenset({0, 2}),
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_step_op = torch.ops.clipflow.flow_step.default
