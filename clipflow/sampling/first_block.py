"""The run of a `FirstBlockCache`: what is kept, and the decision in each step."""

# Shape suffixes: R = rows, N = image tokens, D = channels.

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clipflow.sampling.plan import PlanSpec


class Stream(Protocol):
    """One evaluation on its way through a model.

    Attributes:
        hidden: the residual stream, [R, N, D], written in place.
    """

    hidden: Tensor


@runtime_checkable
class SplitDenoiser(Protocol):
    """A denoiser whose velocity can be computed block by block.

    Attributes:
        stream_shape: (R, N, D) of the residual stream with guidance.
        depth: number of blocks.
    """

    stream_shape: tuple[int, int, int]
    depth: int

    def begin(self, rows: Tensor, index: int) -> Stream:
        """Embed `rows` in evaluation `index`."""

    def advance(self, stream: Stream, begin: int, end: int) -> None:
        """Run blocks `begin` to `end` - 1."""

    def skip(self, stream: Stream, rest: Tensor) -> None:
        """Add `rest`, [R, N, D], to the stream instead of the blocks that are left."""

    def finish(self, stream: Stream) -> Tensor:
        """The velocity, after the last block or `skip`."""


class FirstBlockVelocity:
    """Runs the first block, then the others or what they added in the last computed step.

    Args:
        spec: of the plan; its step_cache is a `FirstBlockCache`.
        denoiser: of the plan.
    """

    def __init__(self, spec: PlanSpec, denoiser: SplitDenoiser) -> None:
        self.spec, self.config, self.denoiser = spec, spec.step_cache, denoiser
        kind = {"dtype": spec.dtype, "device": spec.device}
        # Rows are [null, cond]; those of evaluations without guidance are the last ones.
        self._first, self._known_first, self._known_rest = (
            torch.empty(denoiser.stream_shape, **kind) for _ in range(3)
        )
        self._sums = torch.empty(
            2, dtype=torch.promote_types(spec.dtype, torch.float32), device=spec.device
        )
        self._known_rows = 0
        self.skipped: list[int] = []

    @property
    def nbytes(self) -> int:
        return 3 * self._first.nbytes + self._sums.nbytes

    def start(self) -> None:
        self._known_rows = 0
        self.skipped = []

    def velocity(self, rows: Tensor, index: int) -> Tensor:
        R, step = len(rows), self.spec.table[index].step
        stream = self.denoiser.begin(rows, index)
        first, rest = self._first[-R:], self._known_rest[-R:]
        first.copy_(stream.hidden)
        self.denoiser.advance(stream, 0, 1)
        torch.sub(stream.hidden, first, out=first)
        # A run that has just switched guidance on knows nothing of its null rows.
        may_skip = step >= self.config.warm_up and self._known_rows >= R
        if may_skip and self._change(R) < self.config.threshold:
            self.skipped.append(step)
            self.denoiser.skip(stream, rest)
            return self.denoiser.finish(stream)
        self._known_first[-R:].copy_(first)
        self._known_rows = R
        rest.copy_(stream.hidden)
        self.denoiser.advance(stream, 1, self.denoiser.depth)
        torch.sub(stream.hidden, rest, out=rest)
        return self.denoiser.finish(stream)

    def _change(self, R: int) -> float:
        """mean |r - r'| / mean |r'| of the last R rows; r is overwritten. Waits for a GPU."""
        first, known = self._first[-R:], self._known_first[-R:]
        for place, tensor in enumerate((first.sub_(known), known)):
            torch.linalg.vector_norm(tensor, 1, dtype=self._sums.dtype, out=self._sums[place])
        change, size = self._sums.tolist()
        return change / size if size else float("inf")
