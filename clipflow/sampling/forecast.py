"""The run of a `TaylorForecast`: its schedule and the velocities that are kept."""

# Shape suffixes: R = rows, C = channels, h, w = the latent grid.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clipflow.sampling.plan import Denoiser, PlanSpec

# Of a computed step: the place where its velocity is kept. Of a forecast one: (place, weight) of
# each velocity in the sum.
Entry = int | tuple[tuple[int, float], ...]


def forecast_schedule(spec: PlanSpec) -> list[Entry]:
    """What happens in each evaluation of a spec whose step_cache is a `TaylorForecast`."""
    config, guided = spec.step_cache, spec.guided_evaluations
    places = config.order + 1
    schedule: list[Entry] = []
    begin = computed = 0  # the evaluation that the warm-up began at; the last computed one
    known: list[tuple[int, int]] = []  # (place, step), the newest at the end
    for index, entry in enumerate(spec.table):
        if index and guided[index] and not guided[index - 1]:
            begin, known = index, []
        is_due = (
            index - begin < config.warm_up
            or index >= len(spec.table) - config.cool_down
            or index - computed >= config.interval
        )
        if is_due:
            place = (known[-1][0] + 1) % places if known else 0
            known = [*known, (place, entry.step)][-places:]
            computed = index
            schedule.append(place)
        else:
            weights = lagrange_weights([step for _, step in known], entry.step)
            schedule.append(tuple(zip((place for place, _ in known), weights, strict=True)))
    return schedule


def lagrange_weights(nodes: Sequence[float], at: float) -> list[float]:
    """Weights of values at `nodes` that sum to the polynomial through them at `at`."""
    return [
        math.prod((at - other) / (node - other) for other in nodes if other != node)
        for node in nodes
    ]


class ForecastVelocity:
    """Computes the velocity where the schedule says so and forecasts it elsewhere.

    Args:
        spec: of the plan; its step_cache is a `TaylorForecast`.
        denoiser: of the plan.
    """

    def __init__(self, spec: PlanSpec, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.schedule = forecast_schedule(spec)
        places = spec.step_cache.order + 1
        shape = (spec.rows, *spec.latent_shape)
        # Rows are [null, cond]; those of evaluations without guidance are the last ones.
        self._known = torch.empty(places, *shape, dtype=spec.dtype, device=spec.device)
        self._forecast = torch.empty(shape, dtype=spec.dtype, device=spec.device)
        self.skipped = [
            evaluation.step
            for evaluation, entry in zip(spec.table, self.schedule, strict=True)
            if not isinstance(entry, int)
        ]

    @property
    def nbytes(self) -> int:
        return self._known.nbytes + self._forecast.nbytes

    def start(self) -> None:
        """Nothing to do: each run writes what it reads."""

    def velocity(self, rows: Tensor, index: int) -> Tensor:
        R, entry = len(rows), self.schedule[index]
        if isinstance(entry, int):
            velocity = self.denoiser.velocity(rows, index)
            self._known[entry, -R:].copy_(velocity)
            return velocity
        out = self._forecast[-R:].zero_()
        for place, weight in entry:
            out.add_(self._known[place, -R:], alpha=weight)
        return out
