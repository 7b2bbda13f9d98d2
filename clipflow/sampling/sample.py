"""The sampling loop: noise to latents along the flow ODE, with guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipflow.sampling.guidance import VelocityModel, model_rows
from clipflow.sampling.schedule import FlowSchedule
from clipflow.sampling.solvers import make_solver

# callback(step, timestep, latents) -> replacement of the latents, or None to keep them.
StepCallback = Callable[[int, int, Tensor], Tensor | None]


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
    run = make_solver(solver, schedule.sigmas)
    timesteps: list[int] = schedule.timesteps.tolist()
    dtype = noise.dtype if model_dtype is None else model_dtype

    def velocity(rows: Tensor, index: int) -> Tensor:
        return model(rows, torch.full((len(rows),), timesteps[index], device=rows.device))

    latents = noise.to(torch.promote_types(noise.dtype, torch.float32))
    rows = model_rows(latents, guidance_scale, dtype)
    for index, timestep in enumerate(timesteps):
        latents, rows = run.advance(index, latents, rows, velocity, guidance_scale)
        if callback is not None:
            replaced = callback(index, timestep, latents)
            if replaced is not None:
                latents = replaced.to(latents.dtype)
                rows = model_rows(latents, guidance_scale, dtype)
    return latents
