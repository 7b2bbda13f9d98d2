"""Solvers of the flow ODE dx/ds = v(x, s) from s = 1 (noise) to s = 0 (data).

All of them share `advance`, which runs `clipflow.ops.flow_step` after each call of the model. State
and arithmetic are float32 (float64 latents stay float64). A solver belongs to one run:
`DPMSolverPP2M` remembers the last prediction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from clipflow.ops import flow_step

# velocity(model_input, k) is what the model predicts at noise level sigmas[k]: one row for each of
# `model_input`, which with guidance are [null, cond].
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
        """Advance `latents` from sigmas[index] to sigmas[index + 1], without guidance.

        Steps are taken in order. The model's input has the dtype of the latents.
        """
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return self.advance(index, latents, latents, velocity)[0]

    def advance(
        self,
        index: int,
        latents: Tensor,
        model_input: Tensor,
        velocity: Velocity,
        guidance: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Advance from sigmas[index] to sigmas[index + 1]; steps are taken in order.

        Args:
            index: number of the step.
            latents: [B, ...] float32 or float64.
            model_input: `latents` as the model takes them, [B, ...], or with guidance [2B, ...].
            velocity: calls the model.
            guidance: a number, or [B] float32, one for each sample.

        Returns:
            (latents, model_input) of the next step.
        """
        raise NotImplementedError


class Euler(Solver):
    """First order: x + (s' - s) * v."""

    def advance(
        self,
        index: int,
        latents: Tensor,
        model_input: Tensor,
        velocity: Velocity,
        guidance: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        return flow_step(
            latents,
            velocity(model_input, index),
            coefficients=(self._delta(index), 0.0, 0.0, 0.0),
            guidance=guidance,
            model_dtype=model_input.dtype,
        )[:2]

    def _delta(self, index: int) -> float:
        return self.sigmas[index + 1] - self.sigmas[index]


class Heun(Euler):
    """Second order, two model calls a step; the last step is Euler's: s = 0 is not trained."""

    evaluations = 2

    def advance(
        self,
        index: int,
        latents: Tensor,
        model_input: Tensor,
        velocity: Velocity,
        guidance: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        if index == len(self) - 1:
            return super().advance(index, latents, model_input, velocity, guidance)
        delta, dtype = self._delta(index), model_input.dtype
        _, ahead, slope = flow_step(
            latents,
            velocity(model_input, index),
            coefficients=(delta, 0.0, 0.0, 0.0),
            solver="heun",
            guidance=guidance,
            model_dtype=dtype,
        )
        return flow_step(
            latents,
            velocity(ahead, index + 1),
            slope,
            coefficients=(0.5 * delta, 0.0, 0.0, 0.0),
            solver="heun",
            guidance=guidance,
            model_dtype=dtype,
        )[:2]


class DPMSolverPP2M(Solver):
    """DPM-Solver++ 2M (midpoint) in closed form on flow sigmas; first and last step first order.

        x0 = x - s * v;  r = s' / s;  lam(s) = log((1 - s) / s)
        x <- r * x + (1 - r) * (x0 + (h / (2 * h_before)) * (x0 - x0_before)),  h = lam(s') - lam(s)

    Source: Lu et al., "DPM-Solver++" (2022), algorithm 2.
    """

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(sigmas)
        self._before: Tensor | None = None

    def advance(
        self,
        index: int,
        latents: Tensor,
        model_input: Tensor,
        velocity: Velocity,
        guidance: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        sigma, ratio = self.sigmas[index], self.sigmas[index + 1] / self.sigmas[index]
        gain, before = 0.0, None
        if 0 < index < len(self) - 1:
            gain = 0.5 * self._log_snr_step(index) / self._log_snr_step(index - 1)
            before = self._before
        latents, model_input, self._before = flow_step(
            latents,
            velocity(model_input, index),
            before,
            coefficients=(-sigma, gain, ratio, 1.0 - ratio),
            solver="dpmpp_2m",
            guidance=guidance,
            model_dtype=model_input.dtype,
        )
        return latents, model_input

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
