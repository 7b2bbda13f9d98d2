"""The loop that the UniLIP repository samples with, around diffusers' own transformer.

Restated, not copied: both halves of guidance in one batch, every step embeds the time, projects
the condition and computes its keys and values again, and padding is a bias on the attention.
"""

# Shape suffixes: B = samples, C = channels, L = condition tokens.

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor


def scheduler() -> DPMSolverMultistepScheduler:
    """The solver with the settings of the SANA checkpoints, which UniLIP loads."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
    )


class ReferenceLoop:
    """Samples, a step at a time.

    Args:
        transformer: diffusers' module, or that module compiled.
        hidden: conditions [2B, L, channels], the null rows first.
        mask: [2B, L], 1 where a token is real.
        guidance: the scale.
        steps: of the solver.
    """

    def __init__(
        self,
        transformer: Callable[..., tuple[Tensor]],
        hidden: Tensor,
        mask: Tensor,
        *,
        guidance: float,
        steps: int,
    ) -> None:
        self.transformer, self.hidden, self.mask = transformer, hidden, mask
        self.guidance, self.steps = guidance, steps

    def start(self, noise: Tensor) -> None:
        """Begin at `noise`, [B, C, h, w] float32."""
        self.scheduler = scheduler()
        self.scheduler.set_timesteps(self.steps, device=noise.device)
        self.latents, self.place = noise, 0

    @torch.no_grad()
    def step(self) -> Tensor:
        """One step; returns the latents, [B, C, h, w]."""
        time = self.scheduler.timesteps[self.place]
        velocity = self.velocity(torch.cat([self.latents] * 2), time).float()
        null, cond = velocity.chunk(2)
        velocity = null + self.guidance * (cond - null)
        self.latents = self.scheduler.step(velocity, time, self.latents, return_dict=False)[0]
        self.place += 1
        return self.latents

    @torch.no_grad()
    def velocity(self, rows: Tensor, time: Tensor) -> Tensor:
        """Of `rows`, [2B, C, h, w], at one time."""
        return self.transformer(
            rows.to(self.hidden.dtype),
            encoder_hidden_states=self.hidden,
            encoder_attention_mask=self.mask,
            timestep=time.expand(len(rows)).to(torch.long),
            return_dict=False,
        )[0]

    def run(self, noise: Tensor) -> Tensor:
        """All steps from `noise`; returns the latents."""
        self.start(noise)
        for _ in range(self.steps):
            latents = self.step()
        return latents


def stock_pipeline(transformer: SanaTransformer2DModel) -> SanaPipeline:
    """diffusers' pipeline without text encoder and decoder, for ready conditions."""
    pipeline = SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
