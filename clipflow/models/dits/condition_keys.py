"""Keys and values of cross-attention for all blocks of a transformer, once per condition."""

# Shape suffixes: U = different conditions, L = condition tokens, D = channels, H = heads.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clipflow import ops
from clipflow.errors import ShapeError
from clipflow.sampling.plan import PlanSpec
from clipflow.sampling.weights import version_of


class ConditionKeys:
    """Keys and values of U conditions, which as many equal shares of the samples attend to.

    Args:
        blocks: how many blocks the transformer has.
        count: U.
        heads, channels: of the keys, H and D.
        spec: of the plan; room is made for its condition length.
    """

    def __init__(
        self, blocks: int, count: int, *, heads: int, channels: int, spec: PlanSpec
    ) -> None:
        self.count, self.heads, self.room = count, heads, spec.condition_length
        # A graph reads the same places in every run.
        self._fixed = spec.device.type == "cuda"
        self._buffer = torch.empty(
            blocks, count * self.room, 2 * channels, dtype=spec.dtype, device=spec.device
        )
        self._lengths = torch.zeros(count, dtype=torch.int32, device=spec.device)
        self._length, self._equal = 0, False
        self._source: list[tuple[Tensor, int]] = []

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + self._lengths.nbytes

    def set(
        self,
        conditions: Sequence[Tensor],
        embed: Callable[[Tensor, Tensor], Tensor],
        projections: Sequence[Callable[[Tensor, Tensor], Tensor]],
    ) -> None:
        """Compute keys and values of `conditions`, each [L, channels]; nothing if they are as set.

        Args:
            conditions: U of them; tensors that are the same as last time, and unchanged since, are
                not computed again.
            embed: the transformer's embedding, of (conditions filled up to one length
                [U, L, channels], their lengths [U]) to tokens [U, L, W].
            projections: of each block, (tokens [U * L, W], out [U * L, 2 D]).

        Raises:
            ShapeError: a condition is longer than there is room.
        """
        source = [(tensor, version_of(tensor)) for tensor in conditions]
        if len(source) == len(self._source) and all(
            new is old and version == seen
            for (new, version), (old, seen) in zip(source, self._source, strict=True)
        ):
            return
        self._source = []
        lengths = [len(tensor) for tensor in conditions]
        if max(lengths) > self.room:
            raise ShapeError(
                f"plan: a condition must have at most {self.room} tokens, got {max(lengths)}"
            )
        self._length = self.room if self._fixed else max(lengths)
        self._equal = not self._fixed and min(lengths) == max(lengths)
        self._lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        tokens = pad_sequence(list(conditions), batch_first=True)
        if tokens.shape[1] < self._length:
            tokens = torch.nn.functional.pad(tokens, (0, 0, 0, self._length - tokens.shape[1]))
        embedded = embed(tokens.to(self._buffer.dtype), self._lengths).flatten(0, 1)
        for block, project in enumerate(projections):
            project(embedded, self._buffer[block, : len(embedded)])
        self._source = source

    def attend(self, block: int, query: Tensor, conditions: int | None = None) -> Tensor:
        """Attention of `query`, [rows, N, Hq, K] of consecutive samples; returns the same shape.

        Args:
            block: of the transformer.
            query: queries; every condition has the same number of rows.
            conditions: how many of the last conditions they attend to; all if None.
        """
        rows, N, *heads = query.shape
        skip = 0 if conditions is None else self.count - conditions
        shape = (self.count, self._length, 2, self.heads, heads[1])
        stored = self._buffer[block, : self.count * self._length].view(shape)[skip:]
        # Rows with the same condition are one longer sequence of queries.
        q = query.view(len(stored), rows // len(stored) * N, *heads)
        lengths = None if self._equal else self._lengths[skip:]
        mixed = ops.dit_attention(q, stored[:, :, 0], stored[:, :, 1], key_lengths=lengths)
        return mixed.view(query.shape)


class RowKeys:
    """Keys and values of all conditions of a plan: of null and cond rows together, or apart.

    Args:
        spec: of the plan.
        blocks, heads, channels: as of `ConditionKeys`.
    """

    def __init__(self, spec: PlanSpec, *, blocks: int, heads: int, channels: int) -> None:
        null, cond = spec.conditions
        self.spec = spec
        self.together = not spec.guided or attend_together(spec)
        self.groups = [
            ConditionKeys(blocks, count, heads=heads, channels=channels, spec=spec)
            for count in ([null + cond] if self.together else [null, cond])
        ]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes for keys in self.groups)

    def groups_of(
        self, null: Sequence[Tensor], cond: Sequence[Tensor]
    ) -> Iterator[tuple[ConditionKeys, Sequence[Tensor]]]:
        """Each group with the conditions that it is to be set to."""
        return zip(self.groups, [[*null, *cond]] if self.together else [null, cond], strict=True)

    def attend(self, block: int, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Attention of `query`, [R, N, Hq, K], in one part or two: (its rows, its values).

        Null rows come first, and are left out of evaluations without guidance.
        """
        R, B = len(query), self.spec.samples
        if self.together:
            keys = self.groups[0]
            yield slice(0, R), keys.attend(block, query, keys.count * R // self.spec.rows)
            return
        for half, keys in enumerate(self.groups[-(R // B) :]):
            rows = slice(half * B, (half + 1) * B)
            yield rows, keys.attend(block, query[rows])


def attend_together(spec: PlanSpec) -> bool:
    """Whether null and cond rows go through one attention kernel.

    That saves a GPU launches. A CPU does better without: null prompts are shorter, and each half of
    equal lengths needs no mask.
    """
    return spec.device.type == "cuda" and spec.conditions[0] == spec.conditions[1]
