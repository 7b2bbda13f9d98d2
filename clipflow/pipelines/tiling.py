"""InternVL's dynamic tiling: a picture as tiles of the model's size, of about its own shape.

A picture is squashed into the grid of at most `max_tiles` squares whose aspect ratio is closest to
its own, and cut into them; where there are several, the whole picture follows as one tile more.

Source: Chen et al., "How Far Are We to GPT-4V?" (2024), section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

from PIL import Image

from clipflow.pipelines.image_io import ImageInput, load_image
from clipflow.pipelines.image_processor import ImageProcessor


def tile_grid(width: int, height: int, *, size: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of the tiles of a picture of `width` x `height` pixels.

    Of grids whose aspect ratio is equally close, the larger one is taken where the picture has
    more than half of its pixels; sizes are of one tile's side.
    """
    wanted, area = width / height, width * height
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
    ]
    best, closest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(wanted - columns / rows)
        large_enough = area > 0.5 * size**2 * columns * rows
        if distance < closest or (distance == closest and large_enough):
            best, closest = (columns, rows), distance
    return best


def cut_tiles(
    image: Image.Image, *, size: int, max_tiles: int, resample: int = Image.Resampling.BICUBIC
) -> list[Image.Image]:
    """Tiles of `image`, each `size` x `size`: row by row, then the whole where there are several.

    With `max_tiles` 1 that is the picture itself, squashed into a square.
    """
    columns, rows = tile_grid(*image.size, size=size, max_tiles=max_tiles)
    filters = Image.Resampling(resample)
    whole = _resized(image, (size, size), filters)
    if columns * rows == 1:
        return [whole]
    canvas = _resized(image, (columns * size, rows * size), filters)
    tiles = [
        canvas.crop((left, top, left + size, top + size))
        for top in range(0, rows * size, size)
        for left in range(0, columns * size, size)
    ]
    return [*tiles, whole]


class TileSet:
    """The different tiles of all pictures of a call; equal ones are kept once.

    Attributes:
        processor: what the tiles are cut for.
        tiles: the different ones.
        digests: of their pixels.
        places: for each picture that was added, in order, which tiles are its own.
    """

    def __init__(self, processor: ImageProcessor, max_tiles: int) -> None:
        self.processor = processor
        self.tiles: list[Image.Image] = []
        self.digests: list[bytes] = []
        self.places: list[list[int]] = []
        self._max_tiles = max_tiles
        self._known: dict[bytes, int] = {}
        self._read: dict[int, list[int]] = {}

    def add(self, images: Sequence[ImageInput]) -> list[int]:
        """Add pictures; how many tiles each has.

        Raises:
            InputError: a picture that cannot be read.
        """
        counts = []
        for image in images:
            if id(image) not in self._read:
                self._read[id(image)] = list(self._placed(self._cut(image)))
            self.places.append(self._read[id(image)])
            counts.append(len(self.places[-1]))
        return counts

    def _cut(self, image: ImageInput) -> list[Image.Image]:
        processor = self.processor
        return cut_tiles(
            load_image(image),
            size=processor.size,
            max_tiles=self._max_tiles,
            resample=processor.resample,
        )

    def _placed(self, tiles: Iterable[Image.Image]) -> Iterable[int]:
        for tile in tiles:
            digest = sha256(tile.tobytes()).digest()
            place = self._known.setdefault(digest, len(self.tiles))
            if place == len(self.tiles):
                self.tiles.append(tile)
                self.digests.append(digest)
            yield place


def _resized(image: Image.Image, size: tuple[int, int], filters: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, filters)
