"""Prompts the language model has read and can read on from: their keys and values are kept.

The buffers have room for the longest continuation from the start: one token more is written into
them and nothing is copied.
"""

# Shape suffixes: B = batch, T = prompt tokens, M = tokens of a tree, S = slots, H = LM width, A =
# heads, G = heads of keys, K = width of a head, V = vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clipflow.errors import ShapeError
from clipflow.models.unilip.beginnings import Beginnings, find_beginnings, pictures_of_rows
from clipflow.models.unilip.model import UniLIPModel
from clipflow.models.unilip.qwen2 import rms_norm, rope_table, run_layer
from clipflow.ops import dit_attention

# (layer, q [B, L, A, K], k [B, L, G, K], v [B, L, G, K]) -> [B, L, A, K]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Reading:
    """A batch of prompts that the language model has read, one in each row; without gradients.

    Attributes:
        lengths: real tokens of each row so far, [B] int64.
        hidden: the language model's final state at the last token of each row, [B, H].
    """

    @torch.no_grad()
    def __init__(
        self,
        model: UniLIPModel,
        ids: Tensor,
        mask: Tensor,
        features: Tensor | None,
        *,
        room: int,
        pictures: Tensor | None = None,
    ) -> None:
        """Read prompts; a beginning that several have, pictures and all, is read once.

        Args:
            model: whose language model reads.
            ids: [B, T], padded on either side; a prompt may have any number of pictures (tiles of
                one are pictures here), each of N image positions.
            mask: [B, T], 1 where a token is real.
            features: [P, N, H] of the pictures; None where no prompt has one.
            room: tokens that may be read on: by each row, or of a tree.
            pictures: [K] int64, which picture is at each of the K places for one, in the order of
                the prompts and in them; None where P = K are in order.

        Raises:
            ShapeError: the prompts have more or fewer image positions than `pictures` fill.
        """
        self.model = model
        self.lengths = mask.sum(-1)
        # Real tokens first: then causal attention by itself keeps them from seeing the padding.
        ids = ids.gather(1, mask.argsort(dim=-1, descending=True, stable=True))
        self._rows = torch.arange(len(ids), device=ids.device)
        self._longest = ids.shape[1]
        self._even = bool((self.lengths == self._longest).all())
        self._buffers: list[tuple[Tensor, Tensor]] = []
        places = ids == model.config.tokens.img_context
        if features is None:
            features = model.latent_queries.new_zeros(0, 1, model.config.text.hidden_size)
        seen = pictures_of_rows(places, features, pictures)
        begun = find_beginnings(ids, places, self.lengths, seen, features.shape[1])
        if begun is None:
            every = _chosen(features, [picture for row in seen for picture in row])
            shared = 0
            hidden = self._begin(model.embed_prompt(ids, every), room=room)
        else:
            shared = begun.tokens
            hidden = self._begin_shared(ids, features, seen, begun, room=room)
        self.hidden = hidden[self._rows, self.lengths - 1 - shared]

    @property
    def next_logits(self) -> Tensor:
        """Float32 logits [B, V] of what follows each row."""
        return self.model.head(self.hidden).float()

    @torch.no_grad()
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
            # The heads that share keys become queries: each key is loaded once for all of them.
            grouped = q.unflatten(2, (keys.shape[2], -1))[:, 0].transpose(1, 2)
            lengths = None if even else self.lengths
            y = dit_attention(grouped, keys, values, key_lengths=lengths)
            return y.transpose(1, 2).reshape(q.shape)

        embeddings = self.model.embed_prompt(tokens[:, None])
        self.hidden = self._run(embeddings, place, attend, per_row=True)[:, 0]

    @torch.no_grad()
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
        embeddings = self.model.embed_prompt(tokens[None]).expand(len(self.hidden), -1, -1)
        return self._branch(embeddings, self._longest, depths, ancestors)

    def _begin_shared(
        self,
        ids: Tensor,
        features: Tensor,
        seen: Sequence[Sequence[int]],
        begun: Beginnings,
        *,
        room: int,
    ) -> Tensor:
        """Read each beginning once, then what follows it in each row, whose states it returns."""
        model, shared = self.model, begun.tokens
        first = [picture for row in begun.firsts for picture in seen[row][: begun.pictures]]
        beginning = ids[:1, :shared].expand(len(begun.firsts), -1)
        self._begin(model.embed_prompt(beginning, _chosen(features, first)), room=0)
        room += self._longest - shared
        which = torch.tensor(begun.of_row, device=ids.device)
        pairs = (tuple(t[which] for t in pair) for pair in self._buffers)
        self._buffers = [(_with_room(k, room), _with_room(v, room)) for k, v in pairs]
        rest = torch.arange(self._longest - shared, device=ids.device)
        later = [picture for row in seen for picture in row[begun.pictures :]]
        embeddings = model.embed_prompt(ids[:, shared:], _chosen(features, later))
        return self._branch(embeddings, shared, rest, rest[:, None] >= rest)

    def _begin(self, embeddings: Tensor, *, room: int) -> Tensor:
        """Read `embeddings` [B, L, H] into new buffers; their final states."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._buffers.append((_with_room(k, room), _with_room(v, room)))
            return _attention(q, k, v, None)

        positions = torch.arange(embeddings.shape[1], device=embeddings.device)
        return self._run(embeddings, positions, attend)

    def _branch(self, embeddings: Tensor, start: int, depths: Tensor, ancestors: Tensor) -> Tensor:
        """Read `embeddings` [B, M, H] after the first `start` slots, each seeing its ancestors."""
        stop = start + len(depths)
        seen = torch.cat([ancestors.new_ones(len(depths), start), ancestors], dim=1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for buffer, new in zip(self._buffers[layer], (k, v), strict=True):
                buffer[:, start:stop] = new
            keys, values = (buffer[:, :stop] for buffer in self._buffers[layer])
            return _attention(q, keys, values, seen)

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


def _chosen(features: Tensor, pictures: Sequence[int]) -> Tensor:
    """[K, N, H] of `features` [P, N, H]."""
    return features[torch.tensor(pictures, dtype=torch.int64, device=features.device)]


def _with_room(tensor: Tensor, room: int) -> Tensor:
    """`tensor` [B, T, G, K] at the start of a buffer [B, T + room, G, K], heads outermost."""
    B, T, G, K = tensor.shape
    buffer = tensor.new_zeros(B, G, T + room, K).transpose(1, 2)
    buffer[:, :T] = tensor
    return buffer


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Of q [B, L, A, K] to the keys [B, S, G, K] in `seen` [L, S]; causal where that is None."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=seen is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)
