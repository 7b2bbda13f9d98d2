"""Scales and gates of a Lumina transformer for a whole run: they depend on time and condition."""

# Shape suffixes: T = different times, U = different conditions, R = rows, E = width of the
# embedding, D = channels.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clipflow.models.dits.linears import Linear
from clipflow.sampling.plan import PlanSpec

# Those of 30 steps of published models take 20 MiB a condition in float32. With more than fit they
# are computed in each step, which reads the weights of all `norm1.linear` (a sixth of all) again.
MOST_BYTES = 256 * 2**20


class RowModulations:
    """What modulates the rows of each evaluation: all of a run at once, if that fits.

    Args:
        spec: of the plan.
        blocks: how many blocks the transformer has.
        embedding: E.
        channels: D.
    """

    def __init__(self, spec: PlanSpec, *, blocks: int, embedding: int, channels: int) -> None:
        times = [spec.timesteps[entry.level] for entry in spec.table]
        self.times = list(dict.fromkeys(times))
        self._place = [self.times.index(time) for time in times]
        null, cond = spec.conditions
        self._guided, self._samples, self._null = spec.rows, spec.samples, null
        T, U = len(self.times), null + cond
        kind = {"dtype": spec.dtype, "device": spec.device}
        step = U * channels * (4 * blocks + 1) * spec.dtype.itemsize
        self.at_once = T * step <= MOST_BYTES
        self._time = torch.empty(T, embedding, **kind)
        self._condition = torch.empty(U, embedding, **kind)
        self._embedding = torch.empty(U, embedding, **kind)
        held = T if self.at_once else 1
        self._blocks = torch.empty(blocks, held, U, 4 * channels, **kind)
        self._out = torch.empty(held, U, channels, **kind)
        # Of each row, where several have the same condition.
        self._rows = torch.empty(blocks * spec.rows * 4 * channels if spec.rows > U else 0, **kind)
        self._out_rows = torch.empty(spec.rows * channels if spec.rows > U else 0, **kind)
        sources = [b * null // spec.samples for b in range(spec.samples if null else 0)]
        sources += [null + b * cond // spec.samples for b in range(spec.samples)]
        self._sources = torch.tensor(sources, device=spec.device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def set_weights(self, times: Tensor, blocks: Sequence[Linear], out: Linear) -> None:
        """Take the embeddings of `times` [T, E], and what makes modulations of them."""
        self._time.copy_(times)
        self._layers, self._out_layer = [*blocks], out

    def set_conditions(self, first: int, embeddings: Tensor) -> None:
        """Take the embeddings [u, E] of conditions `first` to `first` + u - 1."""
        end = first + len(embeddings)
        self._condition[first:end] = embeddings
        if not self.at_once:
            return
        active = F.silu(self._time[:, None] + self._condition[None, first:end]).flatten(0, 1)
        for layer, held in zip([*self._layers, self._out_layer], self._held(), strict=True):
            made = torch.empty(len(active), held.shape[-1], dtype=held.dtype, device=held.device)
            held[:, first:end] = layer(active, made).unflatten(0, (len(self.times), -1))

    def of(self, index: int, rows: int) -> tuple[Tensor, Tensor]:
        """(those of all blocks, [blocks, R, 4 D]; the output's, [R, D]) in evaluation `index`.

        Args:
            rows: R; fewer than with guidance are the last ones.
        """
        place = self._place[index]
        if not self.at_once:
            torch.add(self._condition, self._time[place], out=self._embedding)
            F.silu(self._embedding, inplace=True)
            for layer, held in zip([*self._layers, self._out_layer], self._held(), strict=True):
                layer(self._embedding, held[0])
            place = 0
        blocks, out = self._blocks[:, place], self._out[place]
        if rows == out.shape[0]:
            return blocks, out
        if self._samples == out.shape[0] - self._null:  # each sample has its own
            if rows == self._samples:
                return blocks[:, self._null :], out[self._null :]
        sources, width = self._sources[-rows:], blocks.shape[-1]
        spread = self._rows[: len(blocks) * rows * width].view(len(blocks), rows, width)
        out_spread = self._out_rows[: rows * out.shape[-1]].view(rows, -1)
        torch.index_select(blocks, 1, sources, out=spread)
        torch.index_select(out, 0, sources, out=out_spread)
        return spread, out_spread

    def _held(self) -> list[Tensor]:
        return [*self._blocks, self._out]
