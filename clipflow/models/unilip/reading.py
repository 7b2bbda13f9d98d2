"""Prompts the language model has read and can read on from: their keys and values are kept.

The buffers have room for the longest continuation from the start: one token more is written into
them and nothing is copied.
"""

# Shape suffixes: B = batch, T = prompt tokens, M = tokens of a tree, S = slots, H = LM width, A =
# heads, G = heads of keys, K = width of a head, V = vocabulary.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from clipflow.errors import ShapeError
from clipflow.models.unilip.model import UniLIPModel
from clipflow.models.unilip.qwen2 import rms_norm, rope_table, run_layer
from clipflow.ops import dit_attention

# (layer, q [B, L, A, K], k [B, L, G, K], v [B, L, G, K]) -> [B, L, A, K]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Reading:
    """A batch of prompts that the language model has read, one in each row.

    Attributes:
        lengths: real tokens of each row so far, [B] int64.
        hidden: the language model's final state at the last token of each row, [B, H].
    """

    def __init__(
        self, model: UniLIPModel, ids: Tensor, mask: Tensor, features: Tensor, *, room: int
    ) -> None:
        """Read prompts.

        Args:
            model: whose language model reads.
            ids: [B, T], padded on either side.
            mask: [B, T], 1 where a token is real.
            features: [B, N, H] of the pictures in the prompts.
            room: tokens that may be read on: by each row, or of a tree.
        """
        self.model = model
        self.lengths = mask.sum(-1)
        # Real tokens first: then causal attention by itself keeps them from seeing the padding.
        order = mask.argsort(dim=-1, descending=True, stable=True)
        embeddings = model.embed_prompt(ids.gather(1, order), features)
        self._rows = torch.arange(len(ids), device=ids.device)
        self._longest = ids.shape[1]
        self._even = bool((self.lengths == self._longest).all())
        self._buffers: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._buffers.append((_with_room(k, room), _with_room(v, room)))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return y.transpose(1, 2)

        positions = torch.arange(self._longest, device=ids.device)
        hidden = self._run(embeddings, positions, attend)
        self.hidden = hidden[self._rows, self.lengths - 1]

    @property
    def next_logits(self) -> Tensor:
        """Float32 logits [B, V] of what follows each row."""
        return self.model.head(self.hidden).float()

    def extend(self, tokens: Tensor) -> None:
        """Read one token more in each row, `tokens` [B]."""
        place = self.lengths
        self.lengths = place + 1
        self._longest += 1
        longest, even = self._longest, self._even

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for buffer, new in zip(self._buffers[layer], (k, v), strict=True):
                if even:
                    buffer[:, longest - 1] = new[:, 0]
                else:
                    buffer[self._rows, place] = new[:, 0]
            keys, values = (buffer[:, :longest] for buffer in self._buffers[layer])
            return dit_attention(q, keys, values, key_lengths=None if even else self.lengths)

        embeddings = self.model.embed_prompt(tokens[:, None])
        self.hidden = self._run(embeddings, place, attend, per_row=True)[:, 0]

    def tree(self, tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
        """States [B, M, H] of a tree of continuations, the same after each row.

        Nothing of it is kept: what is read next follows the prompts as before. The rows must be
        equally long.

        Args:
            tokens: [M], those of the tree.
            depths: [M], how far each is from the prompt; 0 follows it.
            ancestors: [M, M] bool, whether token j is on the way to token i, or token i itself.

        Raises:
            ShapeError: the rows are not equally long.
        """
        if not self._even:
            found = self.lengths.tolist()
            raise ShapeError(f"tree: the rows must be equally long, got lengths {found}")
        start, stop = self._longest, self._longest + len(tokens)
        prompt = ancestors.new_ones(len(tokens), start)
        seen = torch.cat([prompt, ancestors], dim=1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for buffer, new in zip(self._buffers[layer], (k, v), strict=True):
                buffer[:, start:stop] = new
            keys, values = (buffer[:, :stop].transpose(1, 2) for buffer in self._buffers[layer])
            grouped = q.shape[2] != k.shape[2]
            q = q.transpose(1, 2)
            y = F.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=grouped)
            return y.transpose(1, 2)

        embeddings = self.model.embed_prompt(tokens[None]).expand(len(self.hidden), -1, -1)
        return self._run(embeddings, start + depths, attend)

    def _run(
        self, hidden: Tensor, positions: Tensor, attend: Attend, *, per_row: bool = False
    ) -> Tensor:
        lm = self.model.language_model
        rope = rope_table(lm.rotary_emb, positions)
        for index, layer in enumerate(lm.layers):

            def mix(q: Tensor, k: Tensor, v: Tensor, index: int = index) -> Tensor:
                return attend(index, q, k, v)

            hidden = run_layer(layer, hidden, rope, mix, per_row=per_row)
        return rms_norm(hidden, lm.norm)


def _with_room(tensor: Tensor, room: int) -> Tensor:
    """`tensor` [B, T, G, K] at the start of a buffer [B, T + room, G, K]."""
    B, T, G, K = tensor.shape
    buffer = tensor.new_zeros(B, T + room, G, K)
    buffer[:, :T] = tensor
    return buffer
