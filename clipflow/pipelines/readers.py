"""What reads conversations for a pipeline: pictures and words into the language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from clipflow.errors import InputError
from clipflow.models.language.reading import Reading
from clipflow.pipelines.arguments import positive
from clipflow.pipelines.conditions import ConditionCache
from clipflow.pipelines.conversation import Conversation
from clipflow.pipelines.picture_features import PictureEncoder
from clipflow.pipelines.picture_sets import PictureSet
from clipflow.pipelines.qwen_pictures import WholeSet
from clipflow.pipelines.tiling import TileSet

if TYPE_CHECKING:
    from clipflow.pipelines.parts import PipelineParts

PICTURES_AT_ONCE, TOKENS_AT_ONCE = 16, 4096


class Detail(NamedTuple):
    """How finely a call wants pictures to be seen: its `max_tiles` and `max_pixels`."""

    max_tiles: int | None = None
    max_pixels: int | None = None


class Reader(ABC):
    """Reads conversations.

    Attributes:
        chat_tiles, ask_tiles: `max_tiles` of a conversation, and of a question, that does not say;
            None without tiles.
    """

    chat_tiles: ClassVar[int | None] = None
    ask_tiles: ClassVar[int | None] = None

    def __init__(self, pipeline: PipelineParts) -> None:
        self._pipeline = pipeline
        parts = pipeline.family.feature_parts
        self._encoder = PictureEncoder(pipeline.model, pipeline.offload, parts)

    @property
    def cache(self) -> ConditionCache:
        """Features of the pictures read last."""
        return self._encoder.cache

    @property
    def end_of_turn(self) -> int:
        """Id of the token that ends what the assistant says."""
        return self._pipeline.model.config.tokens.im_end

    @abstractmethod
    def pictures(self, detail: Detail) -> PictureSet:
        """What is to hold the pictures of a call.

        Raises:
            InputError: the family does not see pictures so.
        """

    @abstractmethod
    def pictures_at_once(self, detail: Detail) -> int:
        """How many questions about a picture each are well read together."""

    @torch.no_grad()
    def read(self, conversations: Sequence[Conversation], *, detail: Detail, room: int) -> Reading:
        """Read conversations up to where the assistant answers.

        Args:
            conversations: one for each row.
            detail: how finely pictures are seen.
            room: tokens that may be read on.

        Raises:
            InputError: a picture that cannot be read, a text that is too long, or a detail that
                the family does not have.
        """
        pipeline, pictures = self._pipeline, self.pictures(detail)
        sizes = [pictures.add(conversation.images) for conversation in conversations]
        pairs = zip(conversations, sizes, strict=True)
        texts = [conversation.write(pipeline.prompts, size) for conversation, size in pairs]
        ids, mask = pipeline.prompts.rows(texts, pipeline.device, following=room)
        places = [place for of_picture in pictures.places for place in of_picture]
        return Reading(
            pipeline.model,
            ids,
            mask,
            self._encoder.encode(pictures),
            room=room,
            pictures=torch.tensor(places, dtype=torch.int64),
            grids=pictures.grids,
        )


class TileReader(Reader):
    """Of InternVL's kind: pictures are cut into tiles, each of which has as many features."""

    chat_tiles, ask_tiles = 12, 1

    def pictures(self, detail: Detail) -> TileSet:
        if detail.max_pixels is not None:
            raise InputError(
                "max_pixels is for models that see pictures at their own size; this one cuts "
                "tiles, which max_tiles limits"
            )
        tiles = 1 if detail.max_tiles is None else positive("max_tiles", detail.max_tiles)
        return TileSet(self._pipeline.image_processor, tiles)

    def pictures_at_once(self, detail: Detail) -> int:
        return PICTURES_AT_ONCE


class WholeReader(Reader):
    """Of Qwen2.5-VL's kind: pictures are seen at their own size, within limits."""

    def pictures(self, detail: Detail) -> WholeSet:
        if detail.max_tiles is not None:
            raise InputError(
                "max_tiles is for models that cut pictures into tiles; this one sees them at "
                "their own size, which max_pixels limits"
            )
        return WholeSet(self._pipeline.image_processor.within(detail.max_pixels))

    def pictures_at_once(self, detail: Detail) -> int:
        processor = self.pictures(detail).processor
        token = (processor.patch_size * processor.merge_size) ** 2
        most = TOKENS_AT_ONCE * token // processor.max_pixels
        return min(PICTURES_AT_ONCE, max(1, most))
