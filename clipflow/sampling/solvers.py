"""Solvers of the flow ODE dx/ds = v(x, s) from s = 1 (noise) to s = 0 (data).

All of them share `step(index, latents, velocity)`. State and arithmetic are float32 (float64
latents stay float64). A solver belongs to one run: `DPMSolverPP2M` remembers the last prediction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

# velocity(latents, k) is the guided velocity at noise level sigmas[k], in the dtype of the latents.
Velocity = Callable[[Tensor, int], Tensor]


class Solver:
    """One run over the noise levels `sigmas`, [N + 1], falling; the last one may be 0."""

    #: Calls of the model in a step that is not the last.
    evaluations = 1

    def __init__(self, sigmas: Tensor) -> None:
        if sigmas.ndim != 1 or sigmas.shape[0] < 2:
            raise ValueError(
                f"solver: sigmas must be one row of at least 2 values, got shape "
                f"{tuple(sigmas.shape)}"
            )
        self.sigmas: list[float] = sigmas.double().tolist()
        if any(after >= before for before, after in itertools.pairwise(self.sigmas)):
            raise ValueError(f"solver: sigmas must fall strictly, got {self.sigmas}")

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def step(self, index: int, latents: Tensor, velocity: Velocity) -> Tensor:
        """Advance `latents` from sigmas[index] to sigmas[index + 1]; steps are taken in order."""
        raise NotImplementedError


class Euler(Solver):
    """First order: x + (s' - s) * v."""

    def step(self, index: int, latents: Tensor, velocity: Velocity) -> Tensor:
        latents = _wide(latents)
        return latents + self._delta(index) * velocity(latents, index)

    def _delta(self, index: int) -> float:
        return self.sigmas[index + 1] - self.sigmas[index]


class Heun(Euler):
    """Second order, two model calls a step; the last step is Euler's: s = 0 is not trained."""

    evaluations = 2

    def step(self, index: int, latents: Tensor, velocity: Velocity) -> Tensor:
        latents = _wide(latents)
        slope = velocity(latents, index)
        ahead = latents + self._delta(index) * slope
        if index == len(self) - 1:
            return ahead
        return latents + self._delta(index) * 0.5 * (slope + velocity(ahead, index + 1))


class DPMSolverPP2M(Solver):
    """DPM-Solver++ 2M (midpoint) in closed form on flow sigmas; first and last step first order.

        x0 = x - s * v;  r = s' / s;  lam(s) = log((1 - s) / s)
        x <- r * x + (1 - r) * (x0 + (h / (2 * h_before)) * (x0 - x0_before)),  h = lam(s') - lam(s)

    Source: Lu et al., "DPM-Solver++" (2022), algorithm 2.
    """

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(sigmas)
        self._before: Tensor | None = None

    def step(self, index: int, latents: Tensor, velocity: Velocity) -> Tensor:
        latents = _wide(latents)
        sigma, ratio = self.sigmas[index], self.sigmas[index + 1] / self.sigmas[index]
        clean = latents - sigma * velocity(latents, index)
        target = clean
        if 0 < index < len(self) - 1:
            gain = 0.5 * self._log_snr_step(index) / self._log_snr_step(index - 1)
            target = clean + gain * (clean - self._before)
        self._before = clean
        return ratio * latents + (1.0 - ratio) * target

    def _log_snr_step(self, index: int) -> float:
        return _log_snr(self.sigmas[index + 1]) - _log_snr(self.sigmas[index])


SOLVERS: dict[str, type[Solver]] = {"dpmpp_2m": DPMSolverPP2M, "euler": Euler, "heun": Heun}


def make_solver(name: str, sigmas: Tensor) -> Solver:
    """A fresh solver for one run.

    Raises:
        ValueError: `name` is not a key of SOLVERS, or `sigmas` do not fall.
    """
    if name not in SOLVERS:
        raise ValueError(f"make_solver: name must be one of {sorted(SOLVERS)}, got {name!r}")
    return SOLVERS[name](sigmas)


def _log_snr(sigma: float) -> float:
    """log((1 - s) / s). At s = 1 it is -inf: then h_before is inf and the correction vanishes."""
    return math.log((1.0 - sigma) / sigma) if sigma < 1.0 else -math.inf


def _wide(latents: Tensor) -> Tensor:
    return latents.to(torch.promote_types(latents.dtype, torch.float32))
