"""A dot plot of ratios with their intervals on a logarithmic axis, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

ROW, TOP, LABELS, WIDTH, MARGIN = 18, 46, 400, 460, 40
TICKS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
FASTER, SLOWER = "#1a7f4b", "#c0392b"


def ratio_plot(bars: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Draw one row a bar: a dot at `value`, a line from `low` to `high`; 1 is where peers stand."""
    ends = [1.0, *(ratio[key] for _, ratio in bars for key in ("low", "high"))]
    least, most = math.log(min(ends) / 1.2), math.log(max(ends) * 1.2)
    height = TOP + ROW * len(bars) + 12

    def x(ratio: float) -> float:
        return LABELS + WIDTH * (math.log(ratio) - least) / (most - least)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABELS + WIDTH + MARGIN}" '
        f'height="{height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LABELS}" y="16">times faster than the peer (right of 1: faster)</text>',
    ]
    for tick in TICKS:
        if least <= math.log(tick) <= most:
            color = "#333" if tick == 1 else "#ddd"
            parts.append(
                f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 10}" y2="{height - 8}" '
                f'stroke="{color}"/><text x="{x(tick):.1f}" y="{TOP - 14}" '
                f'text-anchor="middle">{tick:g}</text>'
            )
    for row, (label, ratio) in enumerate(bars):
        y = TOP + ROW * row + ROW / 2
        color = FASTER if ratio["value"] >= 1 else SLOWER
        parts.append(
            f'<text x="{LABELS - 8}" y="{y + 4}" text-anchor="end">{escape(label)}</text>'
            f'<line x1="{x(ratio["low"]):.1f}" x2="{x(ratio["high"]):.1f}" y1="{y}" y2="{y}" '
            f'stroke="{color}" stroke-width="2"/>'
            f'<circle cx="{x(ratio["value"]):.1f}" cy="{y}" r="4" fill="{color}"/>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
