"""Noise levels of a sampling run on the straight path x_s = (1 - s) * data + s * noise.

    s_k = shift * u_k / (1 + (shift - 1) * u_k)

with u_k evenly spaced: from 0.999 down to 0 in `flow_schedule`, or from 1 down to 1 / N, then 0, in
`euler_schedule`.

Source: diffusers' DPMSolverMultistepScheduler with `use_flow_sigmas`; the shift is that of
Esser et al., "Scaling Rectified Flow Transformers" (2024), section 5.3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class FlowSchedule:
    """The noise levels of one run.

    Attributes:
        sigmas: [N + 1] float32 on the CPU, falling from 1 or just under it to exactly 0.
        timesteps: [N] on the CPU, what the DiT is told: int64 floor(1000 * sigma), or float32
            1000 * sigma.
    """

    sigmas: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return self.timesteps.shape[0]


def flow_schedule(num_steps: int, *, shift: float = 3.0) -> FlowSchedule:
    """Noise levels and integer timesteps of a run with `num_steps` solver steps.

    Args:
        num_steps: N, at least 1.
        shift: above 1 spends more steps at high noise; 1 leaves the levels evenly spaced.

    Returns:
        The schedule, computed in float64 and rounded once.

    Raises:
        ValueError: `num_steps` is below 1, or `shift` is not above 0.
    """
    _check("flow_schedule", num_steps, shift)
    alphas = torch.linspace(1.0, 1.0 / TRAIN_STEPS, num_steps + 1, dtype=torch.float64)
    sigmas = shift_sigmas(1.0 - alphas, shift).flip(0)
    sigmas[-1] = 0.0
    # Truncation happens on the float64 values: float32 would move some steps by one.
    timesteps = (sigmas[:-1] * TRAIN_STEPS).to(torch.int64)
    return FlowSchedule(sigmas=sigmas.to(torch.float32), timesteps=timesteps)


def euler_schedule(num_steps: int, *, shift: float = 1.0, truncate: bool = True) -> FlowSchedule:
    """Noise levels from 1 down to 1 / N, evenly spaced before the shift, then 0.

    Args:
        num_steps: N, at least 1.
        shift: as of `flow_schedule`.
        truncate: whether the model is told whole times, as BLIP3-o is; otherwise float ones, as
            BLIP3o-NEXT is.

    Returns:
        The schedule, computed in float32 but for the spacing: whether a time falls below a whole
        number is a matter of the last bit.

    Raises:
        ValueError: `num_steps` is below 1, or `shift` is not above 0.

    Source: diffusers' FlowMatchEulerDiscreteScheduler with sigmas of the caller.
    """
    _check("euler_schedule", num_steps, shift)
    even = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64)
    sigmas = shift_sigmas(even.to(torch.float32), shift)
    timesteps = sigmas * TRAIN_STEPS
    return FlowSchedule(
        sigmas=torch.cat([sigmas, torch.zeros(1)]),
        timesteps=timesteps.to(torch.int64) if truncate else timesteps,
    )


def _check(name: str, num_steps: int, shift: float) -> None:
    if num_steps < 1:
        raise ValueError(f"{name}: num_steps must be at least 1, got {num_steps}")
    if not shift > 0:
        raise ValueError(f"{name}: shift must be above 0, got {shift}")


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels in [0, 1] towards 1; 0 and 1 stay where they are."""
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)
