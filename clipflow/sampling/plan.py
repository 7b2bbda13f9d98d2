"""Sampling planned once and run many times.

A plan belongs to one model and one kind of run. What does not change from step to step is computed
when it is made or when a condition is set; a run is then a fixed chain of fused ops and matrix
products over buffers of the plan, replayed as one CUDA graph on a GPU.
"""

# Shape suffixes: B = samples, C = channels, h, w = the latent grid, L = condition tokens.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clipflow.errors import SamplingError, ShapeError
from clipflow.sampling.cuda_graphs import StepGraphs
from clipflow.sampling.loop import SamplingLoop
from clipflow.sampling.solvers import Evaluation, solver_table
from clipflow.sampling.step_cache import FirstBlockCache, StepCache, attach, check_step_cache
from clipflow.sampling.tracing import kernels_of

TIERS = ("faithful", "fast")

# callback(step, timestep, latents) -> replacement of the latents, or None to keep them.
StepCallback = Callable[[int, float, Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """What kind of run a plan is for; two runs with equal specs share a plan.

    Attributes:
        sigmas: noise levels of the schedule, N + 1 of them, falling.
        timesteps: what the model is told at the first N of them; ints or floats.
        solver: a key of `SOLVERS`.
        samples: B.
        guided: whether null rows are run.
        guidance_interval: (start, end), as fractions of the steps, outside of which they are not.
        latent_shape: (C, h, w).
        conditions: how many different (null, cond) conditions there are; each divides B.
        condition_length: room for the tokens of each.
        dtype: of the model.
        device: of the model.
        tier: "faithful" or "fast".
        backend: what `clipflow.use_backend` had chosen.
        step_cache: how steps are skipped; None computes all.

    Raises:
        InputError: the cache does not go with the solver.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    solver: str
    samples: int
    guided: bool
    latent_shape: tuple[int, int, int]
    conditions: tuple[int, int]
    condition_length: int
    dtype: torch.dtype
    device: torch.device
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    tier: str = "faithful"
    backend: str = "auto"
    step_cache: StepCache | None = None

    def __post_init__(self) -> None:
        check_step_cache(self.step_cache, self.solver)

    @property
    def table(self) -> list[Evaluation]:
        """The solver's evaluations."""
        return solver_table(self.solver, self.sigmas)

    @property
    def guided_evaluations(self) -> list[bool]:
        """Which evaluations of `table` have null rows."""
        start, end = self.guidance_interval
        steps = len(self.timesteps)
        return [self.guided and start <= entry.step / steps < end for entry in self.table]

    @property
    def rows(self) -> int:
        """Rows of the model's input where guidance is on."""
        return self.samples * (2 if self.guided else 1)

    @property
    def tokens(self) -> int:
        """Places of the latent grid."""
        return self.latent_shape[1] * self.latent_shape[2]


class Denoiser(Protocol):
    """A model prepared for one spec: constants, buffers and the chain of one evaluation."""

    def constants(self) -> dict[str, int]:
        """What is precomputed or kept, and its bytes."""

    def set_condition(self, null: Sequence[Tensor], cond: Sequence[Tensor]) -> None:
        """Prepare conditions, each [L, channels]; `null` is empty without guidance."""

    def velocity(self, rows: Tensor, index: int) -> Tensor:
        """Velocity of `rows` in evaluation `index`; [null, cond] rows, or cond rows alone."""


class SamplingPlan:
    """Constants, buffers and the chain of kernels of one kind of run.

    A plan runs one thing at a time: `PlanCache.lease` gives every thread its own.

    Args:
        spec: the kind of run.
        denoiser: the model, prepared for `spec`.
    """

    def __init__(self, spec: PlanSpec, denoiser: Denoiser) -> None:
        self.spec = spec
        self.denoiser = denoiser
        self.loop = SamplingLoop(
            spec.table,
            (spec.samples, *spec.latent_shape),
            guided=spec.guided_evaluations,
            latents_dtype=torch.float32,
            model_dtype=spec.dtype,
            device=spec.device,
        )
        self._guidance = torch.ones(spec.samples, device=spec.device)
        self._cache = attach(spec, denoiser)
        self._graphs = StepGraphs(spec.device, self._evaluate, self._kinds_of_evaluations())
        # A decision in each step is no graph.
        self._graphs.usable &= not isinstance(spec.step_cache, FirstBlockCache)

    @torch.no_grad()
    def run(
        self,
        noise: Tensor,
        null: Sequence[Tensor],
        cond: Sequence[Tensor],
        *,
        guidance: float | Tensor = 1.0,
        callback: StepCallback | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            noise: [B, C, h, w], standard normal.
            null: conditions of the null rows, each [L, channels]; as many as the spec says, or
                none. Sample b has number b // (B / count).
            cond: conditions of the samples, likewise.
            guidance: a number, or [B], one for each sample.
            callback: called after each step; may return replaced latents. On a GPU it costs the
                one graph of the whole run.
            progress: called with the number of steps done since it was last called.

        Returns:
            [B, C, h, w] float32, the caller's own.

        Raises:
            ShapeError: `noise` or the number of conditions is not that of the spec.
            SamplingError: a latent is not finite; says after which step.
        """
        self._check(noise, null, cond)
        self.denoiser.set_condition(null, cond)
        self._guidance.copy_(torch.as_tensor(guidance, dtype=torch.float32))
        if self._cache is not None:
            self._cache.start()
        if self._graphs.usable:
            self._replay(noise, callback, progress)
        else:
            self.loop.start(noise)
            self._stepwise(self._evaluate, callback, progress)
        self._refuse_bad_latents()
        return self.loop.latents.clone()

    @property
    def skipped_steps(self) -> tuple[int, ...]:
        """Numbers of the steps, from 0, that the step cache skipped in the last run."""
        return () if self._cache is None else tuple(self._cache.skipped)

    @property
    def nbytes(self) -> int:
        """Bytes that the plan holds, graphs included."""
        return sum(self._held().values())

    def explain(self) -> str:
        """What is precomputed, its bytes, and the kernels of one step."""
        spec = self.spec
        lines = [
            f"plan: {len(spec.timesteps)} steps of {spec.solver}, {spec.samples} samples"
            f"{' with null rows' if spec.guided else ''}, latents {list(spec.latent_shape)}, "
            f"{spec.dtype}, {spec.device}, tier {spec.tier}, backend {spec.backend}"
            f"{'' if spec.step_cache is None else f', {spec.step_cache}'}",
            "held:",
        ]
        lines += [f"  {name}: {size / 2**20:.2f} MiB" for name, size in self._held().items()]
        kernels = self.kernels()
        lines.append(f"one step: {sum(kernels.values())} kernels")
        lines += [f"  {count} x {name}" for name, count in kernels.items()]
        return "\n".join(lines)

    @torch.no_grad()
    def kernels(self) -> dict[str, int]:
        """Names of the ops of one step that move or compute data, and how often each is called.

        The step is run once to see them; conditions must have been set by a run.
        """
        self.loop.start(torch.zeros_like(self.loop.latents))
        if self._cache is not None:
            self._cache.start()
        return kernels_of(lambda: self._evaluate(0))

    def _evaluate(self, index: int) -> None:
        source = self.denoiser if self._cache is None else self._cache
        self.loop.evaluate(index, source.velocity, self._guidance)

    def _held(self) -> dict[str, int]:
        held = {**self.denoiser.constants(), "latents and solver state": self.loop.nbytes}
        if self._cache is not None:
            held["step cache"] = self._cache.nbytes
        if self._graphs.usable:
            held["CUDA graphs"] = self._graphs.nbytes
        return held

    def _kinds_of_evaluations(self) -> list[int]:
        """Evaluations that together launch every kernel of a run: guided or not, skipped or not."""
        skipped = self.skipped_steps
        kinds = [
            (guided, entry.step in skipped)
            for guided, entry in zip(self.loop.guided, self.loop.table, strict=True)
        ]
        return sorted({kinds.index(kind) for kind in set(kinds)})

    def _replay(
        self,
        noise: Tensor,
        callback: StepCallback | None,
        progress: Callable[[int], object] | None,
    ) -> None:
        whole = range(len(self.loop.table))
        if callback is None:
            self._graphs.prepare([whole])
            self.loop.start(noise)
            self._graphs.replay(whole)
            if progress is not None:
                progress(len(self.spec.timesteps))
            return
        self._graphs.prepare([range(k, k + 1) for k in whole])
        self.loop.start(noise)
        self._stepwise(lambda k: self._graphs.replay(range(k, k + 1)), callback, progress)

    def _stepwise(
        self,
        evaluate: Callable[[int], None],
        callback: StepCallback | None,
        progress: Callable[[int], object] | None,
    ) -> None:
        loop = self.loop
        for index, entry in enumerate(loop.table):
            evaluate(index)
            if not entry.ends_step:
                continue
            if progress is not None:
                progress(1)
            if callback is not None:
                timestep = self.spec.timesteps[entry.step]
                replaced = callback(entry.step, timestep, loop.latents.clone())
                if replaced is not None:
                    loop.latents.copy_(replaced)
                    loop.refresh()

    def _check(self, noise: Tensor, null: Sequence[Tensor], cond: Sequence[Tensor]) -> None:
        spec = self.spec
        wanted = (spec.samples, *spec.latent_shape)
        if tuple(noise.shape) != wanted:
            raise ShapeError(f"plan: noise must be {list(wanted)}, got {list(noise.shape)}")
        if (len(null), len(cond)) != spec.conditions:
            raise ShapeError(
                f"plan: there must be {spec.conditions} (null, cond) conditions, "
                f"got {(len(null), len(cond))}"
            )

    def _refuse_bad_latents(self) -> None:
        step = self.loop.first_bad_step()
        if step is not None:
            spec = self.spec
            raise SamplingError(
                f"the latents are not finite after step {step + 1} of {len(spec.timesteps)} "
                f"(tier {spec.tier!r}, backend {spec.backend!r}, {spec.dtype} on {spec.device})"
            )
