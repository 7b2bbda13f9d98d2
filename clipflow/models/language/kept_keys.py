"""Keys and values of what a language model has read, in buffers with room for what follows.

One token more is written into them and nothing is copied. What the positions mean (embeddings,
angles) is the caller's: prompts with pictures are read in `clipflow.models.language.reading`.
"""

# Shape suffixes: B = rows, T = positions of a beginning, M = positions read at once, S = slots,
# H = width, A = heads, G = heads of keys, K = width of a head.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.models.language.layers import Rope, rms_norm, run_layer
from clipflow.ops import dit_attention

# (layer, q [B, L, A, K], k [B, L, G, K], v [B, L, G, K]) -> [B, L, A, K]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class KeptKeys:
    """Rows that a language model has read, with the keys and values of all its layers.

    Every method returns the model's final states at the positions that it reads.

    Args:
        language_model: transformers' Qwen2, Qwen2.5-VL's text model or Qwen3, without its head.

    Attributes:
        buffers: (keys, values) of each layer, [B, S, G, K] each.
        lengths: positions of each row so far, [B] int64.
        longest: of the rows' lengths.
        shortest: of them.
    """

    def __init__(self, language_model: nn.Module) -> None:
        self._layers, self._norm = language_model.layers, language_model.norm
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def begin(
        self, embeddings: Tensor, rope: Rope, *, room: int, lengths: Tensor | None = None
    ) -> Tensor:
        """Read `embeddings` [B, T, H] into new buffers; [B, T, H].

        Args:
            embeddings: real positions first; what follows them in a row is read and forgotten.
            rope: (cos, sin) of the positions, [T, K/2] each, or [B, T, K/2].
            room: positions that may be read on.
            lengths: [B], real positions of each row; T in all if None.
        """
        self.buffers = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.buffers.append((_with_room(k, room), _with_room(v, room)))
            return _attention(q, k, v, None)

        states = self._run(embeddings, rope, attend)
        B, T, _ = embeddings.shape
        self._set_lengths(torch.full((B,), T, device=states.device) if lengths is None else lengths)
        return states

    def spread(self, of_row: Tensor, lengths: Tensor, *, room: int) -> None:
        """Rows from now on: row i begins with what row `of_row[i]` was, and has `room` more.

        Args:
            of_row: [B] int64.
            lengths: [B] that `branch` will have read the rows to.
            room: positions that may be read on, those of `branch` included.
        """
        pairs = (tuple(t[of_row] for t in pair) for pair in self.buffers)
        self.buffers = [(_with_room(k, room), _with_room(v, room)) for k, v in pairs]
        self._set_lengths(lengths)

    def extend(self, embeddings: Tensor, rope: Rope) -> Tensor:
        """Read one position more in each row; [B, H].

        Args:
            embeddings: [B, 1, H].
            rope: (cos, sin) of each row's position, [B, K/2] each.
        """
        place = self.lengths
        self.lengths = place + 1
        self.longest, self.shortest = self.longest + 1, self.shortest + 1
        longest, even = self.longest, self.even

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for buffer, new in zip(self.buffers[layer], (k, v), strict=True):
                if even:
                    buffer[:, longest - 1] = new[:, 0]
                else:
                    buffer[self._rows, place] = new[:, 0]
            keys, values = (buffer[:, :longest] for buffer in self.buffers[layer])
            return _attend_grouped(q, keys, values, None if even else self.lengths)

        return self._run(embeddings, tuple(part[:, None] for part in rope), attend)[:, 0]

    def advance(self, embeddings: Tensor, rope: Rope) -> Tensor:
        """`extend`, with the same kernels on the same memory in every step; [B, H].

        All slots are looked at, and only `lengths` counts the positions, in place: a CUDA graph
        of one step is one of all steps. No other method may follow but this one.

        Args:
            embeddings: [B, 1, H].
            rope: (cos, sin) of each row's position, [B, K/2] each.
        """
        seen = self.lengths + 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for buffer, new in zip(self.buffers[layer], (k, v), strict=True):
                buffer[self._rows, self.lengths] = new[:, 0]
            return _attend_grouped(q, *self.buffers[layer], seen)

        states = self._run(embeddings, tuple(part[:, None] for part in rope), attend)[:, 0]
        self.lengths.add_(1)
        return states

    def branch(self, embeddings: Tensor, start: int, rope: Rope, ancestors: Tensor) -> Tensor:
        """Read positions into the slots from `start` on, each seeing its row and its ancestors.

        Args:
            embeddings: [B, M, H].
            start: slots of what they follow; of a shorter row only those that it has.
            rope: (cos, sin) of the positions, [M, K/2] each, or [B, M, K/2].
            ancestors: [M, M] bool, whether position i sees position j.

        Returns:
            [B, M, H].
        """
        stop = start + len(ancestors)
        seen = F.pad(ancestors, (start, 0), value=True)
        if start > self.shortest:
            real = torch.arange(stop, device=ancestors.device) < self.lengths[:, None]
            real[:, start:] = True
            seen = seen & real[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for buffer, new in zip(self.buffers[layer], (k, v), strict=True):
                buffer[:, start:stop] = new
            keys, values = (buffer[:, :stop] for buffer in self.buffers[layer])
            return _attention(q, keys, values, seen)

        return self._run(embeddings, rope, attend)

    @property
    def even(self) -> bool:
        """Whether all rows are equally long."""
        return self.shortest == self.longest

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.shortest, self.longest = (int(length) for length in lengths.aminmax())
        self._rows = torch.arange(len(lengths), device=lengths.device)

    def _run(self, hidden: Tensor, rope: Rope, attend: Attend) -> Tensor:
        for index, layer in enumerate(self._layers):

            def mix(q: Tensor, k: Tensor, v: Tensor, index: int = index) -> Tensor:
                return attend(index, q, k, v)

            hidden = run_layer(layer, hidden, rope, mix)
        return rms_norm(hidden, self._norm)


def _attend_grouped(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """Of one position in each row, q [B, 1, A, K], to the first `lengths` [B] keys of each."""
    # The heads that share keys become queries: each key is loaded once for all of them.
    grouped = q.unflatten(2, (k.shape[2], -1))[:, 0].transpose(1, 2)
    y = dit_attention(grouped, k, v, key_lengths=lengths)
    return y.transpose(1, 2).reshape(q.shape)


def _with_room(tensor: Tensor, room: int) -> Tensor:
    """`tensor` [B, T, G, K] at the start of a buffer [B, T + room, G, K], heads outermost."""
    B, T, G, K = tensor.shape
    buffer = tensor.new_zeros(B, G, T + room, K).transpose(1, 2)
    buffer[:, :T] = tensor
    return buffer


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Of q [B, L, A, K] to keys [B, S, G, K] in `seen` [L, S] or [B, L, S]; None is causal."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    seen = seen[:, None] if seen is not None and seen.ndim == 3 else seen
    y = F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=seen is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)
