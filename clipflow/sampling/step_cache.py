"""Step caching: some steps of a run take the model's answer from earlier ones. Opt-in and lossy.

A cache is asked for by its configuration and belongs to one plan; its buffers are made with the
plan. Null and cond rows, and all samples of a run, are computed or skipped together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from clipflow.errors import InputError, SamplingError
from clipflow.sampling.first_block import FirstBlockVelocity, SplitDenoiser
from clipflow.sampling.forecast import ForecastVelocity

if TYPE_CHECKING:
    from clipflow.sampling.plan import Denoiser, PlanSpec


@dataclass(frozen=True)
class FirstBlockCache:
    """Skips all blocks but the first while the first one's residual hardly changes.

    In each step the first block is run. With r what it adds to the residual stream, over all rows,
    and r' the same in the last step that was computed as a whole, the step is skipped if

        mean |r - r'| < threshold * mean |r'|

    and then takes what the other blocks added in that step. How many steps are skipped depends on
    the pictures. The decision is the host's: on a GPU each step waits for it, and the run is no
    CUDA graph.

    Source: ParaAttention's first block cache, after Liu et al., "Timestep Embedding Tells: It's
    Time to Cache for Video Diffusion Model" (TeaCache, 2024).

    Attributes:
        threshold: relative change below which a step is skipped, above 0.
        warm_up: steps at the begin of a run that are always computed, at least 1.

    Raises:
        InputError: a value that cannot be.
    """

    threshold: float = 0.1
    warm_up: int = 1

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not math.isfinite(self.threshold) or self.threshold <= 0:
            raise InputError(
                f"FirstBlockCache: threshold must be a number above 0, got {self.threshold!r}"
            )
        _check_whole("FirstBlockCache: warm_up", self.warm_up, 1)

    def elements(self, spec: PlanSpec, stream: int) -> int:
        """Numbers that the cache keeps for a model whose residual stream has `stream`."""
        return 3 * stream


@dataclass(frozen=True)
class TaylorForecast:
    """Computes the velocity in every `interval`-th step only and forecasts it between.

    The forecast is the polynomial through the last `order` + 1 computed velocities, as a function
    of the step: Taylor's expansion with finite differences for derivatives. The first and
    the last step are always computed. When guidance sets in during a run, the warm-up is repeated,
    since no velocities of null rows are known. Which steps are skipped is known beforehand, so
    that runs remain CUDA graphs.

    Source: Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with
    TaylorSeers" (2025), on the velocity alone.

    Attributes:
        interval: one step of so many is computed, at least 2.
        order: of the polynomial, 0 (the last velocity again) to 3; less while fewer are known.
        warm_up: steps at the begin that are all computed, at least 1.
        cool_down: steps at the end that are all computed, at least 1. The last ones are the
            longest: skipping the one before the last costs 3 dB of PSNR on the embedded model.

    Raises:
        InputError: a value that cannot be.
    """

    interval: int = 2
    order: int = 1
    warm_up: int = 3
    cool_down: int = 2

    def __post_init__(self) -> None:
        _check_whole("TaylorForecast: interval", self.interval, 2)
        _check_whole("TaylorForecast: order", self.order, 0, 3)
        _check_whole("TaylorForecast: warm_up", self.warm_up, 1)
        _check_whole("TaylorForecast: cool_down", self.cool_down, 1)

    def elements(self, spec: PlanSpec, stream: int) -> int:
        """Numbers that the cache keeps; those of the residual stream do not matter."""
        return (self.order + 2) * spec.rows * spec.latent_shape[0] * spec.tokens


StepCache = FirstBlockCache | TaylorForecast


def check_step_cache(cache: object, solver: str) -> None:
    """Raise InputError unless `cache` is None or a cache that goes with `solver`."""
    if cache is None:
        return
    if not isinstance(cache, StepCache):
        raise InputError(
            f"step_cache must be None, a FirstBlockCache or a TaylorForecast, got {cache!r}"
        )
    if solver == "heun":
        raise InputError(
            "step_cache must have a solver with one evaluation a step (dpmpp_2m, euler), got 'heun'"
        )


class CachedVelocity(Protocol):
    """The velocity of a plan with a cache."""

    @property
    def skipped(self) -> Sequence[int]:
        """Steps skipped so far in this run, or to be skipped in every run."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache's buffers."""

    def start(self) -> None:
        """Forget the run before."""

    def velocity(self, rows: Tensor, index: int) -> Tensor:
        """As `Denoiser.velocity`."""


def attach(spec: PlanSpec, denoiser: Denoiser) -> CachedVelocity | None:
    """The cache that `spec` asks for, around `denoiser`; None where it asks for none.

    Raises:
        SamplingError: the blocks of the model cannot be run in parts, as `FirstBlockCache` does.
    """
    if spec.step_cache is None:
        return None
    if isinstance(spec.step_cache, TaylorForecast):
        return ForecastVelocity(spec, denoiser)
    if not isinstance(denoiser, SplitDenoiser):
        name = type(denoiser).__name__
        raise SamplingError(f"FirstBlockCache must have a denoiser with blocks, got a {name}")
    return FirstBlockVelocity(spec, denoiser)


def _check_whole(name: str, value: object, low: int, high: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} must be a whole number {wanted}, got {value!r}")
