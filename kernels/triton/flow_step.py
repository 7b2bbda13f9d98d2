"""One sampler step in Triton; the op and its formulas are in clipflow/ops/flow_step.py.

Bytes moved: reads latents, velocity and, where there is one, previous; writes the new latents, the
model's input and what is kept. Products and sums are rounded each for itself, as in eager PyTorch:
the launch says so to the compiler, which would contract them.
"""

# Shape suffixes: B = samples, N = values of a sample.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values a program: 16 bytes a thread and operand in float32, with 8 warps
WARPS = 8


@triton.jit(do_not_specialize=["samples"])
def flow_step_fwd_kernel(
    latents_ptr,  # [B, N]
    velocity_ptr,  # [B, N], or [2B, N] where GUIDED
    previous_ptr,  # [B, N] or None
    coefficients_ptr,  # [4] float64 or None: the four numbers below
    guidances_ptr,  # [B] or None: the number below
    step,
    gain,
    keep,
    rest,
    guidance,
    new_ptr,  # [B, N]
    model_input_ptr,  # as velocity, or None
    kept_ptr,  # [B, N] or None
    samples,  # B
    values,  # N
    GUIDED: tl.constexpr,
    DPMPP_2M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # int64: B * N can pass 2**31
    blocks = tl.cdiv(values, BLOCK)
    sample = program // blocks
    n = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = n < values
    at = sample * values + n
    second = samples.to(tl.int64) * values  # from a null row to its conditioned one

    if coefficients_ptr is not None:
        step = tl.load(coefficients_ptr).to(tl.float32)
        gain = tl.load(coefficients_ptr + 1).to(tl.float32)
        keep = tl.load(coefficients_ptr + 2).to(tl.float32)
        rest = tl.load(coefficients_ptr + 3).to(tl.float32)

    x = tl.load(latents_ptr + at, mask=inside, other=0.0)
    v = tl.load(velocity_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        if guidances_ptr is not None:
            guidance = tl.load(guidances_ptr + sample)
        cond = tl.load(velocity_ptr + second + at, mask=inside, other=0.0).to(tl.float32)
        v = v + guidance * (cond - v)

    kept = v
    if DPMPP_2M:
        kept = x + step * v
        target = kept
        if previous_ptr is not None:
            previous = tl.load(previous_ptr + at, mask=inside, other=0.0)
            target = kept + gain * (kept - previous)
        new = keep * x + rest * target
    else:
        if previous_ptr is not None:
            v = tl.load(previous_ptr + at, mask=inside, other=0.0) + v
        new = x + step * v

    tl.store(new_ptr + at, new, mask=inside)
    if kept_ptr is not None:
        tl.store(kept_ptr + at, kept, mask=inside)
    if model_input_ptr is not None:
        model_input = new.to(model_input_ptr.dtype.element_ty)
        tl.store(model_input_ptr + at, model_input, mask=inside)
        if GUIDED:
            tl.store(model_input_ptr + second + at, model_input, mask=inside)


def forward(
    latents: Tensor,
    velocity: Tensor,
    previous: Tensor | None,
    coefficients: Sequence[float] | Tensor,
    guidance: float | Tensor,
    solver: str,
    new: Tensor,
    model_input: Tensor,
    kept: Tensor,
) -> None:
    """Write the new latents, the model's input and what is kept.

    Args:
        latents: [B, ...] float32.
        velocity: [B, ...] or [2B, ...]; float32, bfloat16 or float16.
        previous: as `latents`, or None.
        coefficients: four numbers, or a tensor [4] of float64.
        guidance: a number or a tensor [B] of float32.
        solver: "euler", "heun" or "dpmpp_2m".
        new: as `latents`; may be `latents`.
        model_input: as `velocity` in any dtype; nothing of its own where it is `new`.
        kept: as `latents`; nothing of its own where it is `new`.

    All tensors are contiguous and were checked by clipflow.ops.
    """
    if latents.numel() == 0:
        return
    B = latents.shape[0]
    N = latents.numel() // B
    table = coefficients if isinstance(coefficients, Tensor) else None
    step, gain, keep, rest = (0.0,) * 4 if table is not None else map(float, coefficients)
    guidances = guidance if isinstance(guidance, Tensor) else None
    with torch.cuda.device(latents.get_device()):  # the CPU's -1, in the interpreter, does nothing
        flow_step_fwd_kernel[(B * triton.cdiv(N, BLOCK),)](
            latents, velocity, previous, table, guidances, step, gain, keep, rest,
            1.0 if guidances is not None else float(guidance),
            new, None if model_input is new else model_input, None if kept is new else kept,
            B, N, GUIDED=velocity.shape != latents.shape, DPMPP_2M=solver == "dpmpp_2m",
            BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
