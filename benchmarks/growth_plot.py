"""Curves of time and memory against size on logarithmic axes, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

PANEL, LEFT, TOP, GAP = 260, 60, 50, 80
COLORS = {"seconds": "#1a7f4b", "plan_bytes": "#2c5fb3", "peak_bytes": "#c0392b"}
LABELS = {"seconds": "seconds", "plan_bytes": "plan, bytes", "peak_bytes": "peak memory, bytes"}

Curve = Mapping[str, object]


def growth_plot(curves: Sequence[Curve]) -> str:
    """One panel a curve; each measure is relative to its value at the smallest size."""
    width = LEFT + len(curves) * (PANEL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 320)}" '
        f'height="{TOP + PANEL + 60}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="16">growth over the smallest size, with fitted exponents; the dashed '
        "line is in proportion</text>",
    ]
    for number, curve in enumerate(curves):
        parts += _panel(curve, LEFT + number * (PANEL + GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(curve: Curve, left: float) -> list[str]:
    sizes = curve["sizes"]
    lines = {
        key: [point[key] / curve["points"][0][key] for point in curve["points"]]
        for key in curve["exponents"]
    }
    span = sizes[-1] / sizes[0]
    low = min(0.5, *(value for line in lines.values() for value in line))
    high = max(span, *(value for line in lines.values() for value in line)) * 1.2

    def x(size: float) -> float:
        return left + PANEL * math.log(size / sizes[0]) / math.log(span)

    def y(value: float) -> float:
        return TOP + PANEL * math.log(high / value) / math.log(high / low)

    parts = [
        f'<rect x="{left}" y="{TOP}" width="{PANEL}" height="{PANEL}" fill="none" stroke="#999"/>',
        f'<line x1="{x(sizes[0]):.1f}" y1="{y(1):.1f}" x2="{x(sizes[-1]):.1f}" y2="{y(span):.1f}" '
        'stroke="#999" stroke-dasharray="4 3"/>',
        f'<text x="{left + PANEL / 2}" y="{TOP + PANEL + 34}" text-anchor="middle">'
        f"{escape(curve['name'])}</text>",
    ]
    parts += [
        f'<text x="{x(size):.1f}" y="{TOP + PANEL + 16}" text-anchor="middle">{size:g}</text>'
        for size in sizes
    ]
    parts += [
        f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}x</text>'
        for value in (1, 10, 100, 1000)
        if value <= high
    ]
    for row, (key, line) in enumerate(lines.items()):
        color = COLORS[key]
        corners = [(x(size), y(value)) for size, value in zip(sizes, line, strict=True)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        parts.append(f'<polyline fill="none" stroke="{color}" points="{path}"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in corners]
        parts.append(
            f'<text x="{left + 8}" y="{TOP + 16 + 14 * row}" fill="{color}">{LABELS[key]} '
            f"^{curve['exponents'][key]:.2f}</text>"
        )
    return parts
