"""Draw scenes: antialiased shapes on a softly uneven background.

    picture = background + noise, then over it color * coverage + below * (1 - coverage)

Coverage masks (4 x 4 samples a pixel, box-filtered) are computed once for each shape and size:
centers are whole pixels, so drawing is pasting. About 0.05 ms a scene in batches on one core.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np

from clipflow.scenes.world import BACKGROUNDS, CANVAS, COLORS, SIZES, Scene

SUPERSAMPLING = 4
HALF_WINDOW = max(SIZES) // 2  # windows of neighbors never overlap: centers are >= 18 px apart
NOISE_GRID = 8
NOISE_AMPLITUDE = 4.0  # in 1/255

ARM_WIDTH = 1 / 3  # of a cross's side
HOLE = 0.55  # a ring's hole radius, of its outer radius
STAR_INNER = 0.382  # of the outer radius

_CHUNK = 64  # scenes drawn at once: their pixels (0.8 MB) stay in the cache


def _inside_polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Even-odd rule at the points (x, y) for a closed polygon of corners [K, 2]."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _corners(shape: str) -> np.ndarray:
    """Corners [K, 2] of a triangle or star, box centered on 0 and larger side 1; y downward."""
    if shape == "triangle":
        corners = np.array([(0.0, 0.0), (0.5, np.sqrt(0.75)), (-0.5, np.sqrt(0.75))])
    else:
        angle = np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 1.0, STAR_INNER)
        corners = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return (corners - (low + high) / 2) / (high - low).max()


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie in the shape whose bounding box has larger side 1 and center (0, 0)."""
    if shape == "circle":
        return x**2 + y**2 <= 0.25
    if shape == "ring":
        return (x**2 + y**2 <= 0.25) & (x**2 + y**2 >= (0.5 * HOLE) ** 2)
    side = np.maximum(np.abs(x), np.abs(y))
    if shape == "square":
        return side <= 0.5
    if shape == "cross":
        return (side <= 0.5) & (np.minimum(np.abs(x), np.abs(y)) <= ARM_WIDTH / 2)
    return _inside_polygon(*np.broadcast_arrays(x, y), _corners(shape))


def coverage(shape: str, size: float, half_window: int = HALF_WINDOW) -> np.ndarray:
    """Share of each pixel covered by the shape, [2 * half_window] squared float32, centered."""
    count = 2 * half_window * SUPERSAMPLING
    at = ((np.arange(count) + 0.5) / SUPERSAMPLING - half_window) / size
    inside = _inside(shape, at[None, :], at[:, None])
    blocks = inside.reshape(2 * half_window, SUPERSAMPLING, 2 * half_window, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


@cache
def _stencil(shape: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat offsets from the center of full pixels [F] and partly covered ones [E], coverage [E]."""
    alpha = coverage(shape, size).ravel()
    around = np.arange(-HALF_WINDOW, HALF_WINDOW)
    offsets = (around[:, None] * CANVAS + around[None, :]).ravel()
    edge = (alpha > 0) & (alpha < 1)
    return offsets[alpha == 1], offsets[edge], alpha[edge]


@cache
def _upsampler() -> np.ndarray:
    """Bicubic interpolation (Keys, a = -0.5) from NOISE_GRID to CANVAS points, edges repeated."""
    weights = np.zeros((CANVAS, NOISE_GRID))
    at = (np.arange(CANVAS) + 0.5) * NOISE_GRID / CANVAS - 0.5
    for tap in range(-1, 3):
        source = np.floor(at).astype(int) + tap
        t = np.abs(at - source)
        near = 1.5 * t**3 - 2.5 * t**2 + 1
        far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        weight = np.where(t <= 1, near, np.where(t < 2, far, 0))
        np.add.at(weights, (np.arange(CANVAS), source.clip(0, NOISE_GRID - 1)), weight)
    return weights.astype(np.float32)


def _noise(count: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in whole steps of 1/255, [count, 64, 64] int8, at most 4 in absolute value."""
    values = rng.uniform(-NOISE_AMPLITUDE, NOISE_AMPLITUDE, (count, NOISE_GRID, NOISE_GRID))
    smooth = _upsampler() @ values.astype(np.float32) @ _upsampler().T
    return np.rint(smooth.clip(-NOISE_AMPLITUDE, NOISE_AMPLITUDE)).astype(np.int8)


def _paste(pixels: np.ndarray, scenes: Sequence[Scene]) -> None:
    """Draw the objects into pixels [N * 64 * 64, 3] uint8, in place, all of one stencil at once."""
    groups: dict[tuple[str, int], list[tuple[int, tuple[int, int, int]]]] = defaultdict(list)
    for n, scene in enumerate(scenes):
        for o in scene.objects:
            x, y = o.center
            at = (n * CANVAS + y) * CANVAS + x
            groups[o.shape, o.size].append((at, COLORS[o.color]))
    for (shape, size), members in groups.items():
        inner, edge, alpha = _stencil(shape, size)
        at = np.array([at for at, _ in members])[:, None]
        color = np.array([color for _, color in members], dtype=np.uint8)[:, None, :]
        pixels[at + inner] = color
        where = at + edge
        below = pixels[where].astype(np.float32)
        pixels[where] = (below + alpha[:, None] * (color - below) + 0.5).astype(np.uint8)


def render_batch(scenes: Sequence[Scene], rng: np.random.Generator) -> np.ndarray:
    """Draw scenes.

    Args:
        scenes: N scenes whose objects have sizes and centers of the world.
        rng: source of the background noise; N scenes at once take the same numbers from it as
            one after the other.

    Returns:
        [N, 64, 64, 3] uint8, RGB.
    """
    images = np.empty((len(scenes), CANVAS, CANVAS, 3), dtype=np.uint8)
    for begin in range(0, len(scenes), _CHUNK):
        chunk = scenes[begin : begin + _CHUNK]
        part = images[begin : begin + _CHUNK]
        flat = np.array([BACKGROUNDS[scene.background] for scene in chunk], dtype=np.uint8)
        # Two's complement: adding the bytes of a negative int8 wraps to the wanted uint8.
        noise = _noise(len(chunk), rng).view(np.uint8)
        for channel in range(3):  # 5x faster than one add whose innermost axis is the 3 channels
            np.add(flat[:, channel, None, None], noise, out=part[..., channel])
        _paste(part.reshape(-1, 3), chunk)
    return images


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw one scene: [64, 64, 3] uint8, RGB."""
    return render_batch([scene], rng)[0]
