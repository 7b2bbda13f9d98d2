"""One run of a solver over buffers that are made once: noise in, clean latents out."""

# Shape suffixes: B = samples, C = channels, h, w = the latent grid.

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipflow.ops import flow_step
from clipflow.sampling.solvers import Evaluation

# velocity(rows, k) is what the model predicts in evaluation k of the solver's table, one row for
# each of `rows`: [null, cond] in evaluations with guidance, else cond alone.
Velocity = Callable[[Tensor, int], Tensor]


class SamplingLoop:
    """The state of a run: latents, the model's input rows and what the solver remembers.

    Args:
        table: of the solver.
        shape: of the latents, (B, C, h, w).
        guided: which evaluations have null rows, as many as in `table`.
        latents_dtype: float32 or float64, of the state and its arithmetic.
        model_dtype: of the rows that the model sees.
        device: where everything lives.
    """

    def __init__(
        self,
        table: Sequence[Evaluation],
        shape: Sequence[int],
        *,
        guided: Sequence[bool],
        latents_dtype: torch.dtype,
        model_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        B, *rest = shape
        state = {"dtype": latents_dtype, "device": device}
        self.table, self.guided, self.samples = tuple(table), tuple(guided), B
        self.latents = torch.empty(tuple(shape), **state)
        self.rows = torch.empty(
            (2 * B if any(guided) else B, *rest), dtype=model_dtype, device=device
        )
        keeps = any(entry.solver != "euler" for entry in table)
        self.kept = torch.empty(tuple(shape), **state) if keeps else self.latents
        looks_ahead = not all(entry.ends_step for entry in table)
        self.ahead = torch.empty(tuple(shape), **state) if looks_ahead else None
        # The sum of the latents after each step is finite as long as they are.
        steps = table[-1].step + 1
        self.sums = torch.zeros(steps, **state)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        buffers = {
            id(t): t for t in (self.latents, self.rows, self.kept, self.ahead) if t is not None
        }
        return sum(t.nbytes for t in buffers.values())

    def start(self, latents: Tensor) -> None:
        """Begin at `latents`, [B, C, h, w]."""
        self.latents.copy_(latents)
        self.refresh()

    def refresh(self) -> None:
        """Write the model's rows from the latents, after those were replaced."""
        B = self.samples
        self.rows[:B].copy_(self.latents)
        self.rows[-B:].copy_(self.latents)

    def evaluate(self, index: int, velocity: Velocity, guidance: float | Tensor) -> None:
        """Call the model once and move on; evaluations are taken in order.

        Args:
            index: of the evaluation in the table.
            velocity: calls the model.
            guidance: a number, or [B] float32, one for each sample; not read where no null rows
                are.
        """
        entry, guided, B = self.table[index], self.guided[index], self.samples
        rows = self.rows if guided else self.rows[-B:]
        target = self.latents if entry.ends_step else self.ahead
        flow_step(
            self.latents,
            velocity(rows, index),
            self.kept if entry.takes_kept else None,
            coefficients=entry.coefficients,
            solver=entry.solver,
            guidance=guidance if guided else 1.0,
            model_dtype=rows.dtype,
            out=(target, rows, self.kept),
        )
        if not guided and any(self.guided[index + 1 : index + 2]):
            self.rows[:B].copy_(self.rows[B:])
        if entry.ends_step:
            torch.sum(self.latents, dim=tuple(range(self.latents.ndim)), out=self.sums[entry.step])

    def first_bad_step(self) -> int | None:
        """The first step after which a latent was not finite; None if all are. Waits for a GPU."""
        bad = self.sums.isfinite().logical_not().nonzero()
        return int(bad[0]) if len(bad) else None
