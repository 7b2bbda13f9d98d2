"""What reads conversations for a pipeline: pictures and words into the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from clipflow.models.language.reading import Reading
from clipflow.pipelines.arguments import positive
from clipflow.pipelines.conditions import ConditionCache
from clipflow.pipelines.conversation import Conversation
from clipflow.pipelines.tile_features import TileEncoder
from clipflow.pipelines.tiling import TileSet

if TYPE_CHECKING:
    from clipflow.pipelines.parts import PipelineParts


class Reader(Protocol):
    """Reads conversations.

    Attributes:
        cache: features of the pictures read last.
        end_of_turn: id of the token that ends what the assistant says.
        chat_tiles, ask_tiles: `max_tiles` of a conversation, and of a question, that does not say;
            None without tiles.
    """

    cache: ConditionCache
    end_of_turn: int
    chat_tiles: int | None
    ask_tiles: int | None

    def read(
        self, conversations: Sequence[Conversation], *, max_tiles: int | None, room: int
    ) -> Reading:
        """Read conversations up to where the assistant answers.

        Args:
            conversations: one for each row.
            max_tiles: how finely pictures are seen, where the family cuts them into tiles; the
                least where None.
            room: tokens that may be read on.

        Raises:
            InputError: a picture that cannot be read, a text that is too long, or `max_tiles`
                for a family that cuts no tiles.
        """


class TileReader:
    """Of InternVL's kind: pictures are cut into tiles, each of which has as many features."""

    chat_tiles, ask_tiles = 12, 1

    def __init__(self, pipeline: PipelineParts) -> None:
        self._pipeline = pipeline
        self._encoder = TileEncoder(pipeline.model, pipeline.offload, pipeline.family.feature_parts)

    @property
    def cache(self) -> ConditionCache:
        return self._encoder.cache

    @property
    def end_of_turn(self) -> int:
        return self._pipeline.model.config.tokens.im_end

    @torch.no_grad()
    def read(
        self, conversations: Sequence[Conversation], *, max_tiles: int | None, room: int
    ) -> Reading:
        pipeline = self._pipeline
        most = 1 if max_tiles is None else positive("max_tiles", max_tiles)
        tiles = TileSet(pipeline.image_processor, most)
        counts = [tiles.add(conversation.images) for conversation in conversations]
        pairs = zip(conversations, counts, strict=True)
        texts = [conversation.write(pipeline.prompts, count) for conversation, count in pairs]
        ids, mask = pipeline.prompts.rows(texts, pipeline.device, following=room)
        places = [place for of_picture in tiles.places for place in of_picture]
        features = self._encoder.encode(tiles) if tiles.tiles else None
        pictures = torch.tensor(places, dtype=torch.int64)
        return Reading(pipeline.model, ids, mask, features, room=room, pictures=pictures)
