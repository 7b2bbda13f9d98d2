"""Prompts the language model has read and can read on from: their keys and values are kept."""

# Shape suffixes: B = batch, T = prompt tokens, M = tokens of a tree, H = LM width, V = vocabulary.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipflow.errors import ShapeError
from clipflow.models.language.kept_keys import KeptKeys
from clipflow.models.language.layers import Rope, rope_table
from clipflow.models.unilip.beginnings import Beginnings, find_beginnings, pictures_of_rows
from clipflow.models.unilip.model import UniLIPModel


class Reading:
    """A batch of prompts that the language model has read, one in each row; without gradients.

    Attributes:
        kept: keys and values of the rows.
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
        self.kept = KeptKeys(model.language_model)
        lengths = mask.sum(-1)
        # Real tokens first: then causal attention by itself keeps them from seeing the padding.
        ids = ids.gather(1, mask.argsort(dim=-1, descending=True, stable=True))
        places = ids == model.config.tokens.img_context
        if features is None:
            features = model.latent_queries.new_zeros(0, 1, model.config.text.hidden_size)
        seen = pictures_of_rows(places, features, pictures)
        begun = find_beginnings(ids, places, lengths, seen, features.shape[1])
        if begun is None:
            every = _chosen(features, [picture for row in seen for picture in row])
            shared = 0
            given = model.embed_prompt(ids, every)
            rope = self._rope(torch.arange(ids.shape[1], device=ids.device))
            hidden = self.kept.begin(given, rope, room=room, lengths=lengths)
        else:
            shared = begun.tokens
            hidden = self._begin_shared(ids, lengths, features, seen, begun, room=room)
        rows = torch.arange(len(ids), device=ids.device)
        self.hidden = hidden[rows, lengths - 1 - shared]

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row so far, [B] int64."""
        return self.kept.lengths

    @property
    def next_logits(self) -> Tensor:
        """Float32 logits [B, V] of what follows each row."""
        return self.model.head(self.hidden).float()

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> None:
        """Read one token more in each row, `tokens` [B]."""
        embeddings = self.model.embed_prompt(tokens[:, None])
        self.hidden = self.kept.extend(embeddings, self._rope(self.lengths))

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
        if not self.kept.even:
            found = self.lengths.tolist()
            raise ShapeError(f"tree: the rows must be equally long, got lengths {found}")
        embeddings = self.model.embed_prompt(tokens[None]).expand(len(self.hidden), -1, -1)
        start = self.kept.longest
        return self.kept.branch(embeddings, start, self._rope(start + depths), ancestors)

    def _begin_shared(
        self,
        ids: Tensor,
        lengths: Tensor,
        features: Tensor,
        seen: Sequence[Sequence[int]],
        begun: Beginnings,
        *,
        room: int,
    ) -> Tensor:
        """Read each beginning once, then what follows it in each row, whose states it returns."""
        model, kept, shared = self.model, self.kept, begun.tokens
        first = [picture for row in begun.firsts for picture in seen[row][: begun.pictures]]
        beginning = ids[:1, :shared].expand(len(begun.firsts), -1)
        rope = self._rope(torch.arange(ids.shape[1], device=ids.device))
        given = model.embed_prompt(beginning, _chosen(features, first))
        kept.begin(given, tuple(part[:shared] for part in rope), room=0)
        which = torch.tensor(begun.of_row, device=ids.device)
        kept.spread(which, lengths, room=room + ids.shape[1] - shared)
        rest = torch.arange(ids.shape[1] - shared, device=ids.device)
        later = [picture for row in seen for picture in row[begun.pictures :]]
        embeddings = model.embed_prompt(ids[:, shared:], _chosen(features, later))
        after = tuple(part[shared:] for part in rope)
        return kept.branch(embeddings, shared, after, rest[:, None] >= rest)

    def _rope(self, positions: Tensor) -> Rope:
        return rope_table(self.model.language_model.rotary_emb, positions)


def _chosen(features: Tensor, pictures: Sequence[int]) -> Tensor:
    """[K, N, H] of `features` [P, N, H]."""
    return features[torch.tensor(pictures, dtype=torch.int64, device=features.device)]
