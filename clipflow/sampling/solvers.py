"""Solvers of the flow ODE dx/ds = v(x, s) from s = 1 (noise) to s = 0 (data).

A solver is a table: which noise levels the model is asked about, and with which coefficients
`clipflow.ops.flow_step` moves on after each answer. The table is fixed before a run begins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One call of the model, and the `flow_step` that follows it.

    Attributes:
        step: number of the solver step that the call belongs to.
        level: index of the noise level of the call.
        coefficients: (step, gain, keep, rest) of `flow_step`.
        solver: name of the update for `flow_step`.
        takes_kept: whether the update takes what an earlier one kept.
        ends_step: whether the latents move on; Heun's first stage only looks ahead.
    """

    step: int
    level: int
    coefficients: tuple[float, float, float, float]
    solver: str
    takes_kept: bool = False
    ends_step: bool = True


def euler(sigmas: Sequence[float]) -> list[Evaluation]:
    """First order: x + (s' - s) * v."""
    return [
        Evaluation(step=k, level=k, coefficients=(after - before, 0.0, 0.0, 0.0), solver="euler")
        for k, (before, after) in enumerate(itertools.pairwise(sigmas))
    ]


def heun(sigmas: Sequence[float]) -> list[Evaluation]:
    """Second order, two model calls a step; the last step is Euler's: s = 0 is not trained."""
    single = euler(sigmas)
    table = []
    for k, first in enumerate(single[:-1]):
        delta = first.coefficients[0]
        table += [
            Evaluation(
                step=k,
                level=k,
                coefficients=(delta, 0.0, 0.0, 0.0),
                solver="heun",
                ends_step=False,
            ),
            Evaluation(
                step=k,
                level=k + 1,
                coefficients=(0.5 * delta, 0.0, 0.0, 0.0),
                solver="heun",
                takes_kept=True,
            ),
        ]
    return [*table, single[-1]]


def dpmpp_2m(sigmas: Sequence[float]) -> list[Evaluation]:
    """DPM-Solver++ 2M (midpoint) in closed form on flow sigmas; first and last step first order.

        x0 = x - s * v;  r = s' / s;  lam(s) = log((1 - s) / s)
        x <- r * x + (1 - r) * (x0 + (h / (2 * h_before)) * (x0 - x0_before)),  h = lam(s') - lam(s)

    Source: Lu et al., "DPM-Solver++" (2022), algorithm 2.
    """
    table = []
    for k, (before, after) in enumerate(itertools.pairwise(sigmas)):
        ratio, gain = after / before, 0.0
        second_order = 0 < k < len(sigmas) - 2
        if second_order:
            widths = (_log_snr(sigmas[n + 1]) - _log_snr(sigmas[n]) for n in (k, k - 1))
            gain = 0.5 * next(widths) / next(widths)
        table.append(
            Evaluation(
                step=k,
                level=k,
                coefficients=(-before, gain, ratio, 1.0 - ratio),
                solver="dpmpp_2m",
                takes_kept=second_order,
            )
        )
    return table


SOLVERS: dict[str, Callable[[Sequence[float]], list[Evaluation]]] = {
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
}


def solver_table(name: str, sigmas: Tensor | Sequence[float]) -> list[Evaluation]:
    """The evaluations of one run over the noise levels `sigmas`, [N + 1], falling.

    Raises:
        ValueError: `name` is not a key of SOLVERS, or `sigmas` are not one falling row.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver_table: name must be one of {sorted(SOLVERS)}, got {name!r}")
    levels = sigmas.double().tolist() if isinstance(sigmas, Tensor) else list(sigmas)
    if len(levels) < 2 or not all(isinstance(level, float) for level in levels):
        raise ValueError(
            f"solver_table: sigmas must be one row of at least 2 numbers, got {levels}"
        )
    if any(after >= before for before, after in itertools.pairwise(levels)):
        raise ValueError(f"solver_table: sigmas must fall strictly, got {levels}")
    return SOLVERS[name](levels)


def _log_snr(sigma: float) -> float:
    """log((1 - s) / s). At s = 1 it is -inf: then h_before is inf and the correction vanishes."""
    return math.log((1.0 - sigma) / sigma) if sigma < 1.0 else -math.inf
