"""The pictures of a call that asks about them; equal ones are kept, and seen, once."""

# Shape suffixes: N = image tokens of a picture, H = LM width.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from hashlib import sha256

from PIL import Image
from torch import Tensor, nn

from clipflow.models.language.positions import Grid
from clipflow.pipelines.image_io import ImageInput, load_image
from clipflow.pipelines.image_processor import ImageProcessor


class PictureSet(ABC):
    """What the vision tower sees of all pictures of a call: each as a whole, or in tiles.

    Attributes:
        processor: what pictures are seen through.
        pictures: the different ones, of which each is seen by itself; a tile is one.
        digests: of their pixels.
        places: for each picture that was added, in order, which of `pictures` it is made of.
    """

    def __init__(self, processor: ImageProcessor) -> None:
        self.processor = processor
        self.pictures: list[Image.Image] = []
        self.digests: list[bytes] = []
        self.places: list[list[int]] = []
        self._known: dict[bytes, int] = {}
        self._read: dict[int, list[int]] = {}

    def add(self, images: Sequence[ImageInput]) -> list[int]:
        """Add pictures; the size of each, as `Prompts.picture` counts it.

        Raises:
            InputError: a picture that cannot be read.
        """
        sizes = []
        for image in images:
            if id(image) not in self._read:
                self._read[id(image)] = list(self._placed(self.cut(load_image(image))))
            self.places.append(self._read[id(image)])
            sizes.append(self.size(self.places[-1]))
        return sizes

    @property
    @abstractmethod
    def at_once(self) -> int:
        """How many pictures go through the vision tower at once."""

    @property
    @abstractmethod
    def grids(self) -> list[Grid] | None:
        """(rows, columns) of the tokens of each; None where the model counts them only."""

    @abstractmethod
    def cut(self, image: Image.Image) -> list[Image.Image]:
        """What is seen of an RGB `image`."""

    @abstractmethod
    def size(self, places: Sequence[int]) -> int:
        """Of a picture that is made of `places`, as `Prompts.picture` counts it."""

    @abstractmethod
    def features(self, model: nn.Module, places: Sequence[int]) -> Sequence[Tensor]:
        """Features [N, H] of each of `places`, through the vision tower of `model`."""

    def _placed(self, pictures: Iterable[Image.Image]) -> Iterable[int]:
        for picture in pictures:
            digest = sha256(repr(picture.size).encode() + picture.tobytes()).digest()
            place = self._known.setdefault(digest, len(self.pictures))
            if place == len(self.pictures):
                self.pictures.append(picture)
                self.digests.append(digest)
            yield place
