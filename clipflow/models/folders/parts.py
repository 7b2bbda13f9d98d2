"""How many parameters each part of a model has, by the names of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# What a part is called -> beginnings of the names of its parameters.
Parts = Mapping[str, tuple[str, ...]]


def count_shapes(shapes: Mapping[str, Sequence[int]], parts: Parts) -> dict[str, int]:
    """Parameters by part, in the order of `parts`; those of no part do not count."""
    counts = dict.fromkeys(parts, 0)
    for name, shape in shapes.items():
        part = part_of(name, parts)
        if part is not None:
            counts[part] += math.prod(shape)
    return counts


def part_of(name: str, parts: Parts) -> str | None:
    """The part that the parameter `name` belongs to; None if to none."""
    return next((part for part, begin in parts.items() if name.startswith(begin)), None)
