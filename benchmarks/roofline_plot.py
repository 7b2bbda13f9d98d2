"""A roofline scatter as SVG text: arithmetic rate against arithmetic intensity of every case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP = 640, 420, 70, 40
COLORS = ("#1a7f4b", "#2c5fb3", "#c0392b", "#8e44ad", "#d68910", "#117a8b", "#7f8c8d", "#6e2c00",
          "#2e4053", "#cb4335", "#229954", "#a04000")  # fmt: skip

Point = tuple[str, float, float]  # op, FLOP per byte, GFLOP/s


def roofline_plot(points: Sequence[Point], copy_gb_per_s: float, gemm_gflop_per_s: float) -> str:
    """Draw a dot a case under the roof that this run's copy and GEMM rates make."""
    xs = [x for _, x, _ in points] + [0.1, 2 * gemm_gflop_per_s / copy_gb_per_s]
    ys = [y for _, _, y in points] + [1.0, 2 * gemm_gflop_per_s]
    low_x, high_x = math.log10(min(xs) / 1.5), math.log10(max(xs) * 1.5)
    low_y, high_y = math.log10(min(ys) / 1.5), math.log10(max(ys) * 1.5)

    def x(value: float) -> float:
        return LEFT + WIDTH * (math.log10(value) - low_x) / (high_x - low_x)

    def y(value: float) -> float:
        return TOP + HEIGHT * (high_y - math.log10(value)) / (high_y - low_y)

    ops = list(dict.fromkeys(op for op, _, _ in points))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 200}" '
        f'height="{TOP + HEIGHT + 50}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="16">GFLOP/s against FLOP per byte under the roof of this run: copy '
        f"{copy_gb_per_s:.0f} GB/s, GEMM {gemm_gflop_per_s:.0f} GFLOP/s. Dots above the slope "
        "worked in the cache.</text>",
        _ticks(low_x, high_x, lambda v: (x(v), TOP + HEIGHT + 16, "middle")),
        _ticks(low_y, high_y, lambda v: (LEFT - 6, y(v) + 4, "end")),
    ]
    ridge = gemm_gflop_per_s / copy_gb_per_s
    left, right = 10**low_x, 10**high_x
    foot = max(left, 10**low_y / copy_gb_per_s)
    parts.append(
        f'<polyline fill="none" stroke="#333" points="{x(foot):.1f},{y(foot * copy_gb_per_s):.1f} '
        f"{x(ridge):.1f},{y(gemm_gflop_per_s):.1f} {x(right):.1f},{y(gemm_gflop_per_s):.1f}"
        '"/>'
    )
    for op, intensity, rate in points:
        color = COLORS[ops.index(op) % len(COLORS)]
        parts.append(f'<circle cx="{x(intensity):.1f}" cy="{y(rate):.1f}" r="4" fill="{color}"/>')
    for row, op in enumerate(ops):
        at, color = TOP + 16 * row, COLORS[row % len(COLORS)]
        parts.append(
            f'<rect x="{LEFT + WIDTH + 16}" y="{at}" width="10" height="10" fill="{color}"/>'
            f'<text x="{LEFT + WIDTH + 32}" y="{at + 9}">{escape(op)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(low: float, high: float, place) -> str:
    """Labels at the powers of ten between 10**low and 10**high."""
    texts = []
    for power in range(math.ceil(low), math.floor(high) + 1):
        across, down, anchor = place(10.0**power)
        texts.append(
            f'<text x="{across:.1f}" y="{down:.1f}" text-anchor="{anchor}">{10.0**power:g}</text>'
        )
    return "".join(texts)
