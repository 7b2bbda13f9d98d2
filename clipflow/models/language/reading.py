"""Prompts the language model has read and can read on from: their keys and values are kept."""

# Shape suffixes: B = batch, T = prompt tokens, M = tokens of a tree, N = image positions of a
# picture, H = LM width, V = vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from clipflow.models.language.beginnings import Beginnings, find_beginnings, find_places
from clipflow.models.language.kept_keys import KeptKeys
from clipflow.models.language.layers import Rope, rope_table
from clipflow.models.language.positions import Grid, Place, prompt_positions


class ReadingModel(Protocol):
    """What reads: transformers' Qwen2 or Qwen2.5-VL's text model and its head.

    Attributes:
        language_model: without its head.
        image_token: id of the token that stands where a picture's features go.
    """

    language_model: nn.Module

    @property
    def image_token(self) -> int: ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final states [..., H]."""


class Reading:
    """A batch of prompts that the language model has read, one in each row; without gradients.

    Attributes:
        kept: keys and values of the rows.
        hidden: the language model's final state at the last token of each row, [B, H].
    """

    @torch.no_grad()
    def __init__(
        self,
        model: ReadingModel,
        ids: Tensor,
        mask: Tensor,
        features: Sequence[Tensor] | None,
        *,
        room: int,
        pictures: Tensor | None = None,
        grids: Sequence[Grid] | None = None,
    ) -> None:
        """Read prompts; a beginning that several have, pictures and all, is read once.

        Args:
            model: whose language model reads.
            ids: [B, T], padded on either side; a prompt may have any number of pictures (tiles of
                one are pictures here), each of as many image positions as it has features.
            mask: [B, T], 1 where a token is real.
            features: [N, H] of each picture; None where no prompt has one.
            room: tokens that may be read on: by each row, or of a tree.
            pictures: [K] int64, which picture is at each of the K places for one, in the order of
                the prompts and in them; None where they are in order.
            grids: (rows, columns) of each picture's features, for a language model of
                multimodal positions; None for one that counts tokens.

        Raises:
            ShapeError: the prompts have more or fewer image positions than `pictures` fill.
        """
        self.model = model
        self.kept = KeptKeys(model.language_model)
        features = () if features is None else features
        lengths = mask.sum(-1)
        # Real tokens first: then causal attention by itself keeps them from seeing the padding.
        ids = ids.gather(1, mask.argsort(dim=-1, descending=True, stable=True))
        places = find_places(ids == model.image_token, [len(one) for one in features], pictures)
        rows, T = torch.arange(len(ids), device=ids.device), ids.shape[1]
        if grids is None:
            positions = torch.arange(T + 1, device=ids.device).expand(len(ids), -1)
        else:
            positions = prompt_positions(places, grids, T + 1).to(ids.device)
        # Behind each prompt the three of a text are the same.
        self._position = (positions if grids is None else positions[0])[rows, lengths]
        rope = self._rope(positions[..., :T])
        begun = find_beginnings(ids, lengths, places)
        if begun is None:
            shared = 0
            hidden = self.kept.begin(
                self._embed(ids, features, places), rope, room=room, lengths=lengths
            )
        else:
            shared = begun.tokens
            hidden = self._begin_shared(ids, lengths, features, places, rope, begun, room=room)
        self.hidden = hidden[rows, lengths - 1 - shared]
        # Behind a prompt its last token stands again.
        self._prompts = ids.gather(
            1, torch.arange(T, device=ids.device).minimum(lengths[:, None] - 1)
        )

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each row so far, [B] int64."""
        return self.kept.lengths

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.language_model.embed_tokens.num_embeddings

    @property
    def next_logits(self) -> Tensor:
        """Float32 logits [B, V] of what follows each row."""
        return self.model.head(self.hidden).float()

    def tokens_of_prompts(self) -> Tensor:
        """Which tokens each prompt has, [B, V] bool."""
        known = torch.zeros(
            len(self._prompts), self.vocab_size, dtype=torch.bool, device=self._prompts.device
        )
        return known.scatter_(1, self._prompts, value=True)

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> None:
        """Read one token more in each row, `tokens` [B]."""
        embeddings = self.model.language_model.embed_tokens(tokens[:, None])
        self.hidden = self.kept.extend(embeddings, self._rope(self._position))
        self._position = self._position + 1

    @torch.no_grad()
    def tree(self, tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
        """States [B, M, H] of a tree of continuations, the same after each row.

        Nothing of it is kept: what is read next follows the prompts as before.

        Args:
            tokens: [M], those of the tree.
            depths: [M], how far each is from the prompt; 0 follows it.
            ancestors: [M, M] bool, whether token j is on the way to token i, or token i itself.
        """
        embeddings = self.model.language_model.embed_tokens(tokens[None])
        embeddings = embeddings.expand(len(self.hidden), -1, -1)
        rope = self._rope(self._position[:, None] + depths)
        return self.kept.branch(embeddings, self.kept.longest, rope, ancestors)

    def _begin_shared(
        self,
        ids: Tensor,
        lengths: Tensor,
        features: Sequence[Tensor],
        places: Sequence[Sequence[Place]],
        rope: Rope,
        begun: Beginnings,
        *,
        room: int,
    ) -> Tensor:
        """Read each beginning once, then what follows it in each row, whose states it returns."""
        kept, shared, firsts = self.kept, begun.tokens, begun.firsts
        before = [[place for place in places[row] if place.stop <= shared] for row in firsts]
        after = [[place for place in row if place.stop > shared] for row in places]
        given = self._embed(ids[firsts, :shared], features, before)
        kept.begin(given, tuple(part[firsts, :shared] for part in rope), room=0)
        which = torch.tensor(begun.of_row, device=ids.device)
        kept.spread(which, lengths, room=room + ids.shape[1] - shared)
        rest = torch.arange(ids.shape[1] - shared, device=ids.device)
        given = self._embed(ids[:, shared:], features, after)
        rope = tuple(part[:, shared:] for part in rope)
        return kept.branch(given, shared, rope, rest[:, None] >= rest)

    def _embed(
        self, ids: Tensor, features: Sequence[Tensor], places: Sequence[Sequence[Place]]
    ) -> Tensor:
        """Embeddings of `ids`, the features of the pictures in `places` at the image positions."""
        embeddings = self.model.language_model.embed_tokens(ids)
        chosen = [features[place.picture] for row in places for place in row]
        if not chosen:
            return embeddings
        image = (ids == self.model.image_token)[..., None].expand_as(embeddings)
        return embeddings.masked_scatter(image, torch.cat(chosen).to(embeddings.dtype))

    def _rope(self, positions: Tensor) -> Rope:
        return rope_table(self.model.language_model.rotary_emb, positions)
