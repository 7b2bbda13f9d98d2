"""InternVL's dynamic tiling: a picture as tiles of the model's size, of about its own shape.

A picture is squashed into the grid of at most `max_tiles` squares whose aspect ratio is closest to
its own, and cut into them; where there are several, the whole picture follows as one tile more.

Source: Chen et al., "How Far Are We to GPT-4V?" (2024), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor, nn

from clipflow.pipelines.image_processor import ImageProcessor
from clipflow.pipelines.picture_sets import PictureSet

PIXELS_AT_ONCE = 8 * 448**2  # through the vision tower


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


class TileSet(PictureSet):
    """Tiles of pictures; the size of a picture is how many it has."""

    grids = None

    def __init__(self, processor: ImageProcessor, max_tiles: int) -> None:
        super().__init__(processor)
        self._max_tiles = max_tiles

    @property
    def at_once(self) -> int:
        return max(1, PIXELS_AT_ONCE // self.processor.size**2)

    def cut(self, image: Image.Image) -> list[Image.Image]:
        processor = self.processor
        return cut_tiles(
            image,
            size=processor.size,
            max_tiles=self._max_tiles,
            resample=processor.resample,
        )

    def size(self, places: Sequence[int]) -> int:
        return len(places)

    def features(self, model: nn.Module, places: Sequence[int]) -> Sequence[Tensor]:
        pixels = self.processor([self.pictures[place] for place in places])
        return model.encode_image(pixels.to(model.device, model.dtype))


def _resized(image: Image.Image, size: tuple[int, int], filters: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, filters)
