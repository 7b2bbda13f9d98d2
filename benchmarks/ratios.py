"""Statistics of paired times: ratios with bootstrap intervals, geometric mean, worst case."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Ratio:
    """How many times faster than its peer: geometric mean over rounds, and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Ratios of many cases: geometric mean, worst with its name, best, and every case below 1."""

    geomean: float
    best: float
    worst: float
    worst_case: str
    losses: tuple[str, ...]


def geomean(values: Sequence[float]) -> float:
    """Geometric mean of positive numbers.

    Raises:
        ValueError: there is no number, or one is not positive.
    """
    if not values or min(values) <= 0:
        raise ValueError(f"geomean: values must be positive and at least one, got {list(values)}")
    return math.exp(sum(map(math.log, values)) / len(values))


def paired_ratio(peer: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Ratio of times peer / ours, round by round, with a bootstrap interval over the rounds.

    Raises:
        ValueError: the two have not the same number of rounds.
    """
    if len(peer) != len(ours):
        raise ValueError(f"paired_ratio: rounds must be equal, got {len(peer)} and {len(ours)}")
    ratios = [p / o for p, o in zip(peer, ours, strict=True)]
    rng = random.Random(0)  # the same rounds give the same interval
    means = sorted(geomean(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    tail = round((1 - LEVEL) / 2 * RESAMPLES)
    return Ratio(value=geomean(ratios), low=means[tail], high=means[-1 - tail])


def summarize(ratios: dict[str, float]) -> Summary:
    """Sum up ratios by case name. A loss is a ratio below 1."""
    worst = min(ratios, key=lambda case: ratios[case])
    return Summary(
        geomean=geomean(list(ratios.values())),
        best=max(ratios.values()),
        worst=ratios[worst],
        worst_case=worst,
        losses=tuple(case for case, ratio in ratios.items() if ratio < 1),
    )
