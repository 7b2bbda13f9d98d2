"""The world of the scenes: what exists in it, where things may stand, which pairs are held out.

A scene is a background and one to four objects on a 3 x 3 grid of cells. Coordinates are
continuous pixels: pixel i covers [i, i + 1), so the canvas is symmetric about 32 and an object of
odd size has half-covered border pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Look = tuple[str, str]  # (color, shape)

CANVAS = 64
GRID = 3
CELL_CENTERS = (12, 32, 52)
JITTER = 1
SIZES = (14, 15, 16)
MAX_OBJECTS = 4

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 50),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "purple": (140, 60, 190),
    "pink": (245, 130, 190),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "gray": (184, 184, 184),
    "dark": (48, 48, 56),
    "sand": (224, 208, 168),
    "sky": (168, 208, 240),
}
DEFAULT_BACKGROUND = "gray"
COLOR_NAMES = tuple(COLORS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
LOOKS: tuple[Look, ...] = tuple((color, shape) for color in COLOR_NAMES for shape in SHAPES)

# Unit steps in (x, y) with y downward, as in the picture.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object; `center` (x, y) and `size` (larger side) are its bounding box's, in px."""

    shape: str
    color: str
    cell: int  # row * 3 + column
    center: tuple[int, int]
    size: int

    @property
    def look(self) -> Look:
        return (self.color, self.shape)


@dataclass(frozen=True, slots=True)
class Scene:
    """A background's name and the objects on it."""

    background: str
    objects: tuple[SceneObject, ...]


class Dice:
    """Cheap scalar draws from a numpy Generator.

    One scalar call of a Generator costs about 2 us; a sample needs 20 to 40 of them. A Dice takes
    `BLOCK` uniforms in one call, so what a sample yields depends on the generator's state alone.
    """

    BLOCK = 48
    __slots__ = ("_rng", "_uniforms")

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._uniforms: list[float] = []

    @classmethod
    def of(cls, rng: np.random.Generator | Dice) -> Dice:
        return rng if isinstance(rng, Dice) else cls(rng)

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._uniforms:
            self._uniforms = self._rng.random(self.BLOCK).tolist()
        return self._uniforms.pop()

    def below(self, bound: int) -> int:
        """An integer in 0 .. bound - 1."""
        return int(self.uniform() * bound)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choice(self, items: Sequence[Item]) -> Item:
        return items[int(self.uniform() * len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different items in random order."""
        pool = list(items)
        for i in range(count):
            j = i + int(self.uniform() * (len(pool) - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


Rng = np.random.Generator | Dice


def _pair_is_held_out(first: Look, second: Look) -> bool:
    key = "|".join(sorted((" ".join(first), " ".join(second))))
    return first != second and zlib.crc32(key.encode()) % 10 == 0


_HELD_OUT = frozenset((a, b) for a in LOOKS for b in LOOKS if _pair_is_held_out(a, b))


def is_held_out(objects: Sequence[SceneObject] | Sequence[Look]) -> bool:
    """Whether two of the objects (or looks) form a pair that training must never show together.

    An unordered pair of different looks is held out when the crc32 of "color shape|color shape"
    (sorted) is 0 modulo 10.
    """
    looks = [o.look if isinstance(o, SceneObject) else o for o in objects]
    return any((a, b) in _HELD_OUT for i, a in enumerate(looks) for b in looks[:i])


def random_looks(dice: Dice, count: int, *, training: bool, distinct: bool = False) -> list[Look]:
    """`count` independent looks; no held-out pair in training; `distinct`: no shape twice."""
    looks: list[Look] = []
    while len(looks) < count:
        look = dice.choice(LOOKS)
        if distinct and any(look[1] == shape for _, shape in looks):
            continue
        if training and any((look, other) in _HELD_OUT for other in looks):
            continue
        looks.append(look)
    return looks


def place_objects(
    dice: Dice, looks: Sequence[Look], cells: Sequence[int], background: str
) -> Scene:
    """Put each look into its cell with a random shift and size."""
    return Scene(background, tuple(place(dice, *pair) for pair in zip(looks, cells, strict=True)))


def place(dice: Dice, look: Look, cell: int) -> SceneObject:
    """One object of that look in that cell, with a random shift and size."""
    row, column = divmod(cell, GRID)
    x = CELL_CENTERS[column] + dice.below(2 * JITTER + 1) - JITTER
    y = CELL_CENTERS[row] + dice.below(2 * JITTER + 1) - JITTER
    return SceneObject(look[1], look[0], cell, (x, y), dice.choice(SIZES))


def random_background(dice: Dice) -> str:
    """The default one time in two, else any of the four."""
    return DEFAULT_BACKGROUND if dice.chance(0.5) else dice.choice(BACKGROUND_NAMES)


def random_scene(
    rng: Rng,
    *,
    count: int | None = None,
    background: str | None = None,
    identical: bool | None = None,
    distinct_shapes: bool = False,
    training: bool = True,
) -> Scene:
    """Draw a scene.

    Args:
        rng: generator (or a Dice made from one).
        count: number of objects, 1 to 4; drawn evenly if None.
        background: its name; if None, gray one time in two, else any.
        identical: all objects of one look; if None, one time in four.
        distinct_shapes: no shape twice, so that "the circle" names one object.
        training: leave out every held-out pair.
    """
    dice = Dice.of(rng)
    count = 1 + dice.below(MAX_OBJECTS) if count is None else count
    if not 1 <= count <= MAX_OBJECTS:
        raise ValueError(f"random_scene: count must be 1 to {MAX_OBJECTS}, got {count}")
    background = random_background(dice) if background is None else background
    if background not in BACKGROUNDS:
        raise ValueError(
            f"random_scene: background must be one of {', '.join(BACKGROUNDS)}, got {background!r}"
        )
    if identical is None:
        identical = not distinct_shapes and dice.chance(0.25)
    if identical:
        looks = [dice.choice(LOOKS)] * count
    else:
        looks = random_looks(dice, count, training=training, distinct=distinct_shapes)
    return place_objects(dice, looks, dice.sample(range(GRID * GRID), count), background)


def nearest_cell(x: float, y: float) -> int:
    """The cell whose center lies nearest to the point (x, y)."""
    pitch = CELL_CENTERS[1] - CELL_CENTERS[0]
    column, row = (min(max(round((v - CELL_CENTERS[0]) / pitch), 0), GRID - 1) for v in (x, y))
    return row * GRID + column


def stands(first: SceneObject, relation: str, second: SceneObject, margin: float = 0) -> bool:
    """Whether `first` stands in that relation: farther along its axis than on the other axis."""
    step_x, step_y = RELATIONS[relation]
    dx, dy = first.center[0] - second.center[0], first.center[1] - second.center[1]
    along, across = (dx * step_x, abs(dy)) if step_x else (dy * step_y, abs(dx))
    return along > across + margin
