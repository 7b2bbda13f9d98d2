"""Read a picture back into a scene.

    pixel = background + alpha * (color - background)

The background is the one most pixels lie nearest to. Every other pixel gets the color on whose
line from the background it lies best, so that antialiased and blurred borders count for their own
object's color (the nearest palette color of a border pixel is often a third one: half red, half
gray is nearest to pink). Pixels with alpha >= 1/2 form connected components; a component's shape
is the drawn template that overlaps its alpha best near the center of its bounding box.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from clipflow.scenes.renderer import HALF_WINDOW, coverage
from clipflow.scenes.world import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    CANVAS,
    COLOR_NAMES,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    nearest_cell,
)

UNKNOWN = "unknown"  # shape of a thing that no template fits; no prompt asks for it

MIN_AREA = 20  # px; the smallest object, a star of size 14, covers about 61
MIN_OVERLAP = 0.6  # of a component with its template, soft intersection over union
ONE_COLOR = 0.8  # share of a component that must agree on the color to be one object
_SEARCH = 2  # px around the box's center where the template is tried
_HALF = HALF_WINDOW + _SEARCH

_BACKGROUND_TABLE = np.array(list(BACKGROUNDS.values()), dtype=np.float32)
_COLOR_TABLE = np.array(list(COLORS.values()), dtype=np.float32)
_PALETTE = np.concatenate([_BACKGROUND_TABLE, _COLOR_TABLE])


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, list[tuple[str, int, int, int]]]:
    """Every shape and size at every shift: masks [T, P], their squared norms [T], their names."""
    masks, names = [], []
    shifts = range(-_SEARCH, _SEARCH + 1)
    for shape in SHAPES:
        for size in SIZES:
            mask = coverage(shape, size, _HALF)
            for dy in shifts:
                for dx in shifts:  # the border of `mask` is empty, so rolling only shifts it
                    masks.append(np.roll(mask, (dy, dx), axis=(0, 1)).ravel())
                    names.append((shape, size, dx, dy))
    bank = np.array(masks)
    return bank, np.square(bank).sum(axis=1), names


def _find_background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the background and its color [3] in this picture, from pixels [P, 3] float32."""
    # |p - c|^2 without |p|^2, which is the same for every c
    distance = np.square(_PALETTE).sum(axis=1) - 2 * pixels @ _PALETTE.T
    nearest = distance.argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(_PALETTE))
    index = int(counts[: len(BACKGROUND_NAMES)].argmax())
    if counts[index] == 0:  # nothing is near any background: take the one nearest on average
        index = int(distance[:, : len(BACKGROUND_NAMES)].sum(axis=0).argmin())
        return BACKGROUND_NAMES[index], _BACKGROUND_TABLE[index]
    return BACKGROUND_NAMES[index], np.median(pixels[nearest == index], axis=0)


def _segment(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Color index [P] of pixels [P, 3] float32; -1 where alpha is below 1/2."""
    lines = _COLOR_TABLE - background  # [C, 3]
    lengths = np.square(lines).sum(axis=1)
    offset = pixels - background
    alpha = ((offset @ lines.T) / lengths).clip(0, 1)  # [P, C]
    # |offset - alpha * line|^2 without |offset|^2, which is the same for every color
    residual = alpha * (alpha * lengths - 2 * offset @ lines.T)
    color = residual.argmin(axis=1)
    own_alpha = np.take_along_axis(alpha, color[:, None], axis=1)[:, 0]
    return np.where(own_alpha >= 0.5, color, -1)


def _alpha(pixels: np.ndarray, background: np.ndarray, index: int) -> np.ndarray:
    """Coverage [H, W] of pixels [H, W, 3] by one color."""
    line = _COLOR_TABLE[index] - background
    return ((pixels - background) @ (line / (line @ line))).clip(0, 1)


def _core_color(pixels: np.ndarray, part: np.ndarray, alpha: np.ndarray) -> int:
    """Index of the palette color nearest to the best-covered quarter of a component."""
    inside = alpha[part]
    core = pixels[part][inside >= np.quantile(inside, 0.75)]
    return int(np.square(_COLOR_TABLE - np.median(core, axis=0)).sum(axis=1).argmin())


def label_components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the 8-connected components of a mask [H, W]: labels from 1 on [H, W], their count.

    Works on horizontal runs: a picture has about a hundred of them, so the loop is short.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    rows, begins = np.nonzero(change == 1)
    ends = np.nonzero(change == -1)[1]
    runs = list(zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first_above = 0
    for i, (row, begin, end) in enumerate(runs):
        while runs[first_above][0] < row - 1:
            first_above += 1
        for j in range(first_above, i):
            above_row, above_begin, above_end = runs[j]
            if above_row == row or above_begin > end:
                break
            if above_end >= begin:
                parent[root(i)] = root(j)
    labels = np.zeros(mask.shape, dtype=np.int32)
    number: dict[int, int] = {}
    for i, (row, begin, end) in enumerate(runs):
        labels[row, begin:end] = number.setdefault(root(i), len(number) + 1)
    return labels, len(number)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (the last two exclusive) of a mask [H, W] that is not empty."""
    columns, rows = np.nonzero(mask.any(axis=0))[0], np.nonzero(mask.any(axis=1))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _match(alpha: np.ndarray, part: np.ndarray) -> tuple[str, tuple[int, int], int]:
    """Shape, center and size of the template that overlaps the component `part` best.

    `alpha` [H, W] is the coverage by the component's color. Only the component's box, one pixel
    wider for its soft border, is looked at: neighbors are at least two pixels away.
    """
    left, top, right, bottom = _box(part)
    x, y = round((left + right) / 2), round((top + bottom) / 2)
    center, size = (x, y), max(right - left, bottom - top)
    if size > 2 * _HALF:
        return UNKNOWN, center, size
    window = np.zeros((2 * _HALF, 2 * _HALF), dtype=np.float32)
    x0, y0 = max(left - 1, x - _HALF, 0), max(top - 1, y - _HALF, 0)
    x1, y1 = min(right + 1, x + _HALF, CANVAS), min(bottom + 1, y + _HALF, CANVAS)
    window[y0 - y + _HALF : y1 - y + _HALF, x0 - x + _HALF : x1 - x + _HALF] = alpha[y0:y1, x0:x1]
    bank, norms, names = _templates()
    flat = window.ravel()
    common = bank @ flat
    overlap = common / (norms + flat @ flat - common)
    best = int(overlap.argmax())
    if overlap[best] < MIN_OVERLAP:
        return UNKNOWN, center, size
    shape, size, dx, dy = names[best]
    return shape, (x + dx, y + dy), size


def _parts(labels: np.ndarray, count: int, color: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Masks of the things in the picture, each with its color's index; specks are left out.

    A component of several colors is several things that touch.
    """
    parts = []
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    for number in range(1, count + 1):
        if areas[number] < MIN_AREA:
            continue
        part = labels == number
        votes = np.bincount(color[part], minlength=len(COLOR_NAMES))
        main = int(votes.argmax())
        if votes[main] >= ONE_COLOR * areas[number]:
            parts.append((part, main))
            continue
        for index in np.nonzero(votes >= MIN_AREA)[0].tolist():
            sub_labels, sub_count = label_components(part & (color == index))
            sub_areas = np.bincount(sub_labels.ravel(), minlength=sub_count + 1)
            large = [k for k in range(1, sub_count + 1) if sub_areas[k] >= MIN_AREA]
            parts += [(sub_labels == k, index) for k in large]
    return parts


def detect(image: np.ndarray) -> Scene:
    """Read a picture back into a scene, objects in reading order of their cells.

    Args:
        image: [64, 64, 3] uint8, RGB.

    Returns:
        What is seen. A thing that no drawn shape fits has the shape "unknown"; a picture may show
        more things than a scene of the world has, or none.

    Raises:
        ValueError: the picture has another shape or dtype.
    """
    image = np.asarray(image)
    if image.shape != (CANVAS, CANVAS, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"detect: image must be [{CANVAS}, {CANVAS}, 3] uint8, "
            f"got {list(image.shape)} {image.dtype}"
        )
    pixels = image.astype(np.float32)
    name, background = _find_background(pixels.reshape(-1, 3))
    color = _segment(pixels.reshape(-1, 3), background).reshape(CANVAS, CANVAS)
    labels, count = label_components(color >= 0)
    objects = []
    for part, index in _parts(labels, count, color):
        index = _core_color(pixels, part, _alpha(pixels, background, index))
        shape, center, size = _match(_alpha(pixels, background, index), part)
        objects.append(SceneObject(shape, COLOR_NAMES[index], nearest_cell(*center), center, size))
    return Scene(name, tuple(sorted(objects, key=lambda o: (o.cell, o.center))))


def agrees(scene: Scene, detected: Scene, within: int = 1) -> bool:
    """Whether both have the same background and, one to one, the same shapes, colors and centers.

    Centers may differ by `within` px on each axis.
    """
    if scene.background != detected.background or len(scene.objects) != len(detected.objects):
        return False
    rest = list(detected.objects)
    for o in scene.objects:
        for found in rest:
            shift = (abs(a - b) for a, b in zip(o.center, found.center, strict=True))
            if o.look == found.look and max(shift) <= within:
                rest.remove(found)
                break
    return not rest
