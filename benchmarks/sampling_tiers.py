"""What the fast tier costs in accuracy, and what plans cost in memory and kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.sampling_models import (
    GUIDANCE,
    TINY,
    Cell,
    Models,
    Workload,
    plan_spec,
    relative_error,
)
from clipflow import CLIPFlowPipeline
from clipflow.models.dits.sana import SanaTransformer
from clipflow.sampling import SamplingPlan

Result = dict[str, object]
PROMPTS = ("a red circle left of a blue square", "a green star above a yellow ring")


def random_weights(cell: Cell, models: Models, steps: int) -> Result:
    """The row of a model with random weights, over one run of `steps` steps."""
    device, dtype = models.stock.device, models.stock.dtype
    work = Workload(cell, device, dtype)
    plans = {
        tier: SamplingPlan(spec, models.ours.denoiser(spec))
        for tier in ("faithful", "fast")
        for spec in [plan_spec(cell, steps, tier, device, dtype)]
    }
    row = {"model": cell.model, "blocks": cell.blocks, "batch": cell.batch, "weights": "random"}
    return {**row, **compare(plans, work.noise, work.null, work.cond, GUIDANCE)}


def trained(steps: int, device: torch.device, dtype: torch.dtype) -> list[Result]:
    """The row of the embedded model, on prompts that it can draw."""
    pipeline = CLIPFlowPipeline.from_pretrained("scenes", device=device, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(PROMPTS), *pipeline.model.latent_shape, generator=generator).to(device)
    plans = {}
    for tier in ("faithful", "fast"):
        pipeline(list(PROMPTS), num_inference_steps=steps, tier=tier, output_type="latent")
        plans[tier] = pipeline.plans.plans()[-1]
    cond = pipeline.conditions.text_to_image(PROMPTS)
    # One null condition for each, as the pipeline's plan has it.
    null = pipeline.conditions.text_to_image([None]) * plans["fast"].spec.conditions[0]
    scale = pipeline.defaults.guidance_scale
    blocks = len(pipeline.model.dit.transformer_blocks)
    row = {"model": "scenes", "blocks": blocks, "batch": len(PROMPTS), "weights": "trained"}
    return [{**row, **compare(plans, noise, null, cond, scale)}]


@torch.no_grad()
def compare(
    plans: dict[str, SamplingPlan],
    noise: Tensor,
    null: list[Tensor],
    cond: list[Tensor],
    guidance: float,
) -> Result:
    """Relative L2 of the fast velocity at every step of a faithful run, and of the fast run's end.

    `guided` is the error after guidance, which magnifies what differs between the two halves.
    """
    faithful, fast = plans["faithful"], plans["fast"]
    for plan in plans.values():
        plan.denoiser.set_condition(null, cond)
    errors, guided = [], []
    velocity = faithful.denoiser.velocity

    def both(rows: Tensor, index: int) -> Tensor:
        exact = velocity(rows, index).clone()
        found = fast.denoiser.velocity(rows, index)
        errors.append(relative_error(found, exact))
        halves = [v.double().chunk(2) for v in (found, exact)]
        guided.append(relative_error(*(n + guidance * (c - n) for n, c in halves)))
        return exact

    loop = faithful.loop
    loop.start(noise)
    scale = torch.full((len(noise),), guidance, device=noise.device)
    for index in range(len(loop.table)):
        loop.evaluate(index, both, scale)
    end = relative_error(fast.run(noise, null, cond, guidance=guidance), loop.latents)
    kernels = {tier: sum(plan.kernels().values()) for tier, plan in plans.items()}
    blocks = len(faithful.denoiser.blocks)
    inside = {tier: count - kernels_of_ends(tier) for tier, count in kernels.items()}
    return {
        "steps": len(errors),
        "fast_error": max(errors),
        "fast_error_median": float(torch.tensor(errors).median()),
        "guided_error": max(guided),
        "end_error": end,
        "plan_bytes": {tier: plan.nbytes for tier, plan in plans.items()},
        "kernels_per_step": kernels,
        "kernels_per_block": {tier: count / blocks for tier, count in inside.items()},
    }


def kernels_of_ends(tier: str) -> int:
    """Kernels of a step outside of the blocks: twice those of one block less those of two."""
    counts = []
    for blocks in (1, 2):
        cell = Cell(model="tiny", blocks=blocks, batch=1, side=TINY.sample_size)
        spec = plan_spec(cell, 1, tier, torch.device("cpu"), torch.float32)
        plan = SamplingPlan(spec, SanaTransformer(cell.config).denoiser(spec))
        work = Workload(cell, spec.device, spec.dtype)
        plan.denoiser.set_condition(work.null, work.cond)
        counts.append(sum(plan.kernels().values()))
    return 2 * counts[0] - counts[1]
