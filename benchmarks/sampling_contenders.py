"""Who samples in `benchmarks/sampling.py`: diffusers in its forms, and our plans.

A contender has `velocity(rows, index)` for the comparison with float64, `step()`, which goes round
and round through the steps of a run, and `run()`, a whole run for new prompts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers import SanaPipeline
from torch import Tensor

from benchmarks.peers.sana_reference import ReferenceLoop, stock_pipeline
from benchmarks.sampling_models import GUIDANCE, Cell, Models, Workload, plan_spec
from clipflow import accelerate
from clipflow.sampling import SamplingPlan

EAGER, INDUCTOR, PIPELINE = "diffusers eager", "diffusers Inductor", "SanaPipeline"
FAITHFUL, FAST, ACCELERATED = "faithful", "fast", "accelerated diffusers"
PEERS = (EAGER, INDUCTOR, PIPELINE)


class Contender(Protocol):
    """Somebody who samples one workload."""

    def velocity(self, rows: Tensor, index: int) -> Tensor: ...

    def step(self) -> object: ...

    def run(self) -> Tensor: ...


class Reference:
    """The reference loop on some form of diffusers' transformer."""

    def __init__(self, transformer: object, work: Workload, steps: int) -> None:
        self.work = work
        self.loop = ReferenceLoop(
            transformer, work.hidden, work.mask, guidance=GUIDANCE, steps=steps
        )
        self.loop.start(work.noise)

    def velocity(self, rows: Tensor, index: int) -> Tensor:
        return self.loop.velocity(rows, self.loop.scheduler.timesteps[index])

    def step(self) -> None:
        if self.loop.place == self.loop.steps:
            self.loop.start(self.work.noise)
        self.loop.step()

    def run(self) -> Tensor:
        return self.loop.run(self.work.noise)


class Stock:
    """diffusers' SanaPipeline; whole runs only."""

    def __init__(self, pipeline: SanaPipeline, work: Workload, steps: int) -> None:
        self.pipeline, self.work, self.steps = pipeline, work, steps

    def run(self) -> Tensor:
        work, B = self.work, len(self.work.noise)
        pixels = work.noise.shape[-1] * 32
        return self.pipeline(
            negative_prompt=None,  # its default "" may not come with ready conditions
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            height=pixels,
            width=pixels,
            latents=work.noise,
            negative_prompt_embeds=work.hidden[:B],
            negative_prompt_attention_mask=work.mask[:B],
            prompt_embeds=work.hidden[B:],
            prompt_attention_mask=work.mask[B:],
            use_resolution_binning=False,
            output_type="latent",
            return_dict=False,
        )[0]


class Planned:
    """Ours: one plan, whose null condition is known and whose others are new in every run."""

    def __init__(self, plan: SamplingPlan, work: Workload) -> None:
        self.plan, self.work, self.place = plan, work, 0
        self.guidance = torch.full((len(work.noise),), GUIDANCE, device=work.noise.device)
        with torch.no_grad():
            plan.denoiser.set_condition(work.null, work.cond)

    @torch.no_grad()
    def velocity(self, rows: Tensor, index: int) -> Tensor:
        # A copy, since the next call writes the same buffer.
        return self.plan.denoiser.velocity(rows, index).clone()

    @torch.no_grad()
    def step(self) -> None:
        if self.place == 0:
            self.plan.loop.start(self.work.noise)
        self.plan.loop.evaluate(self.place, self.plan.denoiser.velocity, self.guidance)
        self.place = (self.place + 1) % len(self.plan.loop.table)

    def run(self) -> Tensor:
        work = self.work
        new = [tokens.clone() for tokens in work.cond]
        return self.plan.run(work.noise, work.null, new, guidance=GUIDANCE)


class Cast:
    """The contenders of the cells of one model; what cannot take part is in `absent`.

    Attributes:
        absent: why somebody is not there, by name.
    """

    def __init__(self, models: Models, *, inductor: bool, pipeline: bool) -> None:
        self.models = models
        self.absent: dict[str, str] = {}
        device = models.stock.device
        self._transformers = {EAGER: models.stock}
        if inductor:
            torch._dynamo.reset()  # no recompile limit
            mode = "max-autotune" if device.type == "cuda" else None
            self._transformers[INDUCTOR] = torch.compile(models.stock, dynamic=False, mode=mode)
        else:
            self.absent[INDUCTOR] = "left out of quick runs and at full depth"
        self._pipeline = stock_pipeline(models.stock) if pipeline else None
        self._transformers[ACCELERATED] = models.second_stock()
        accelerate(self._transformers[ACCELERATED])

    def of(self, cell: Cell, work: Workload, steps: int, *, runs: bool) -> dict[str, Contender]:
        """Contenders by name; `runs` adds those that have no single steps."""
        found: dict[str, Contender] = {
            name: Reference(transformer, work, steps)
            for name, transformer in self._transformers.items()
        }
        if runs and self._pipeline is not None:
            found[PIPELINE] = Stock(self._pipeline, work, steps)
        for tier in (FAITHFUL, FAST):
            spec = plan_spec(cell, steps, tier, work.noise.device, work.hidden.dtype)
            found[tier] = Planned(SamplingPlan(spec, self.models.ours.denoiser(spec)), work)
        return found
