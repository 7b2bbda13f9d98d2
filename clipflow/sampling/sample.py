"""The sampling loop of any velocity model: noise to latents along the flow ODE, with guidance.

    v = null + g * (cond - null)

Source: Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipflow.sampling.loop import SamplingLoop
from clipflow.sampling.schedule import FlowSchedule
from clipflow.sampling.solvers import solver_table

# model(latents [R, C, h, w], timesteps [R]) -> velocity [R, C, h, w]; times are int64 or
# float32, as the schedule has them.
VelocityModel = Callable[[Tensor, Tensor], Tensor]
# callback(step, timestep, latents) -> replacement of the latents, or None to keep them.
StepCallback = Callable[[int, float, Tensor], Tensor | None]


@torch.no_grad()
def sample(
    model: VelocityModel,
    noise: Tensor,
    schedule: FlowSchedule,
    *,
    solver: str = "dpmpp_2m",
    guidance_scale: float | Tensor = 1.0,
    model_dtype: torch.dtype | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrate the flow from `noise` to clean latents.

    `clipflow.sampling.SamplingPlan` does the same for the models that it knows, faster.

    Args:
        model: velocity of rows; called with 2B rows [null, cond], or B rows at guidance 1.
        noise: [B, C, h, w], standard normal.
        schedule: noise levels and timesteps of the run.
        solver: "dpmpp_2m", "euler" or "heun" (two model calls a step).
        guidance_scale: a number, or [B] float32, one for each sample; the number 1 runs no null
            rows.
        model_dtype: dtype of the model's latents; that of `noise` when not given.
        callback: called after each step; may return replaced latents.

    Returns:
        [B, C, h, w] float32 (float64 for float64 noise).

    Raises:
        ValueError: `solver` is not known.
    """
    table = solver_table(solver, schedule.sigmas)
    timesteps: list[float] = schedule.timesteps.tolist()  # whole ones stay int
    guided = isinstance(guidance_scale, Tensor) or guidance_scale != 1.0
    loop = SamplingLoop(
        table,
        noise.shape,
        guided=[guided] * len(table),
        latents_dtype=torch.promote_types(noise.dtype, torch.float32),
        model_dtype=noise.dtype if model_dtype is None else model_dtype,
        device=noise.device,
    )
    loop.start(noise)

    def velocity(rows: Tensor, index: int) -> Tensor:
        times = torch.full((len(rows),), timesteps[table[index].level], device=rows.device)
        # A copy, since flow_step writes the next rows in place.
        return model(rows.clone(), times)

    for index, entry in enumerate(table):
        loop.evaluate(index, velocity, guidance_scale)
        if callback is not None and entry.ends_step:
            replaced = callback(entry.step, timesteps[entry.step], loop.latents.clone())
            if replaced is not None:
                loop.latents.copy_(replaced)
                loop.refresh()
    return loop.latents
