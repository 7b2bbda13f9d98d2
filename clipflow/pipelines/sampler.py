"""From conditions to latents: sorts the samples of a call into runs, each by one plan."""

# Shape suffixes: C = latent channels, h, w = the latent grid, L = condition tokens.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipflow.pipelines.options import PictureSize, SamplingOptions
from clipflow.registry import chosen_backend
from clipflow.sampling import FlowSchedule, PlanCache, PlanSpec
from clipflow.sampling.plan import StepCallback

# Plans make room for conditions in steps of this many tokens, so that few plans serve all prompts.
LENGTH_STEP = 64


@dataclass(frozen=True)
class Run:
    """Samples that go through one plan together: equal in size and in whether they are guided."""

    samples: tuple[int, ...]
    size: PictureSize
    guided: bool


class Sampler:
    """Draws the latents of pipeline calls for one model.

    Args:
        model: of any family.
        schedule: (configuration, steps) -> the family's noise levels and model times.

    Attributes:
        plans: `clipflow.sampling.PlanCache` of the model's diffusion transformer.
    """

    def __init__(self, model: nn.Module, schedule: Callable[[Any, int], FlowSchedule]) -> None:
        self.model = model
        self._schedule = schedule
        self.plans = PlanCache(model.dit)

    def runs(self, options: SamplingOptions) -> list[Run]:
        """The runs of a call; with `batch_invariant` each sample is one by itself."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        for sample, (size, scale) in enumerate(
            zip(options.sizes, options.guidance_scales, strict=True)
        ):
            alone = (sample,) if options.batch_invariant else ()
            kinds.setdefault((size, scale != 1.0, *alone), []).append(sample)
        return [Run(tuple(samples), key[0], key[1]) for key, samples in kinds.items()]

    def latents(
        self,
        run: Run,
        noise: Tensor,
        null: Sequence[Tensor],
        cond: Sequence[Tensor],
        options: SamplingOptions,
        *,
        callback: StepCallback | None,
        progress: Callable[[int], object],
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Sample one run.

        Args:
            run: one of `runs(options)`.
            noise: its samples' noise, [samples, C, h, w].
            null, cond: conditions of *all* samples of the call, each [L, channels]; `null` is
                empty where nothing is guided.
            options: of the call.
            callback, progress: as of `SamplingPlan.run`.

        Returns:
            The latents, [samples, C, h, w] float32, and the steps that were skipped.
        """
        cond = shared([cond[sample] for sample in run.samples])
        null = shared([null[sample] for sample in run.samples]) if run.guided else []
        scales = torch.tensor([options.guidance_scales[sample] for sample in run.samples])
        with self.plans.lease(self._spec(run, null, cond, options)) as plan:
            latents = plan.run(
                noise, null, cond, guidance=scales, callback=callback, progress=progress
            )
            return latents, plan.skipped_steps

    def _spec(
        self, run: Run, null: list[Tensor], cond: list[Tensor], options: SamplingOptions
    ) -> PlanSpec:
        schedule = self._schedule(self.model.config, options.num_inference_steps)
        longest = max(len(tensor) for tensor in [*null, *cond])
        return PlanSpec(
            sigmas=tuple(schedule.sigmas.tolist()),
            timesteps=tuple(schedule.timesteps.tolist()),
            solver=options.solver,
            samples=len(run.samples),
            guided=run.guided,
            guidance_interval=options.guidance_interval,
            latent_shape=(self.model.config.latent_channels, *run.size[:2]),
            conditions=(len(null), len(cond)),
            condition_length=-(-longest // LENGTH_STEP) * LENGTH_STEP,
            dtype=self.model.dtype,
            device=self.model.device,
            tier=options.tier,
            step_cache=options.step_cache,
            backend=chosen_backend(),
        )


def shared(conditions: Sequence[Tensor]) -> list[Tensor]:
    """`conditions` of consecutive samples with the repeats of one tensor left out.

    Each that is left stands for the same number of samples; where that cannot be, all are left.
    """
    changes = [0] + [
        place
        for place in range(1, len(conditions))
        if conditions[place] is not conditions[place - 1]
    ]
    lengths = {
        end - begin for begin, end in zip(changes, [*changes[1:], len(conditions)], strict=True)
    }
    return [conditions[place] for place in changes] if len(lengths) == 1 else list(conditions)
