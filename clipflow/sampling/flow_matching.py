"""The training side of flow matching: random noise levels, noisy latents and their target.

    x_s = (1 - s) * data + s * noise,   target velocity = noise - data

Source: Lipman et al., "Flow Matching for Generative Modeling" (2023); times as in Esser et al.,
"Scaling Rectified Flow Transformers" (2024): u = sigmoid(normal), s = 1 - floor(1000 u) / 1000.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipflow.ops import flow_interpolate
from clipflow.sampling.schedule import TRAIN_STEPS, shift_sigmas


@dataclass(frozen=True)
class FlowTimes:
    """Noise levels of a training batch.

    Attributes:
        sigmas: [B] float32 in (0, 1].
        timesteps: [B] int64 in 1..1000, what the DiT is told.
    """

    sigmas: Tensor
    timesteps: Tensor


def draw_times(
    batch: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    shift: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> FlowTimes:
    """Draw logit-normal noise levels.

    Args:
        batch: B.
        generator: source of randomness; must live on `device`.
        device: where the result lives.
        shift: applied to the levels as in `flow_schedule`; UniLIP trains with 1.
        mean: of the normal before the sigmoid of u; above 0 means less noise, since s = 1 - u.
        std: of the normal before the sigmoid.
    """
    normal = torch.randn(batch, generator=generator, device=device)
    return times_from_uniform(torch.sigmoid(normal * std + mean), shift=shift)


def draw_uniform_times(
    batch: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    shift: float = 1.0,
) -> FlowTimes:
    """Draw noise levels that are all as likely, as BLIP3-o trains; arguments as of `draw_times`."""
    return times_from_uniform(torch.rand(batch, generator=generator, device=device), shift=shift)


def drop_conditions(
    hidden: Tensor, probability: float = 0.1, *, generator: torch.Generator | None = None
) -> Tensor:
    """Conditions [B, L, C], some of them zeros: the null condition, for guidance to lead away from.

    Args:
        hidden: of the pictures to draw.
        probability: of each sample to be dropped.
        generator: source of randomness; must live on the device of `hidden`.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), section 3.2.
    """
    chances = torch.rand(len(hidden), generator=generator, device=hidden.device)
    return hidden * (chances >= probability).to(hidden.dtype)[:, None, None]


def times_from_uniform(u: Tensor, *, shift: float = 1.0) -> FlowTimes:
    """Noise levels for positions `u`, [B] in [0, 1], on the table of 1000 training levels."""
    index = (u.double() * TRAIN_STEPS).floor().clamp(0, TRAIN_STEPS - 1)
    sigmas = shift_sigmas((TRAIN_STEPS - index) / TRAIN_STEPS, shift)
    # The nudge keeps k / 1000 * 1000 from falling to k - 1; levels are at least 1e-6 apart.
    timesteps = (sigmas * TRAIN_STEPS + 1e-9).to(torch.int64)
    return FlowTimes(sigmas=sigmas.to(torch.float32), timesteps=timesteps)


def interpolate(data: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Mix data with noise, and say which velocity the model should predict there.

    Args:
        data: clean latents, [B, ...].
        noise: standard normal, shape and dtype of `data`.
        sigmas: noise level of each sample, [B] float32.

    Returns:
        (noisy latents, target velocity), both of the shape and dtype of `data`; mixed in float32.
    """
    return flow_interpolate(data, noise, sigmas.to(data.device))


def flow_matching_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, in float32; all noise levels count alike."""
    return torch.nn.functional.mse_loss(velocity.float(), target.float())
