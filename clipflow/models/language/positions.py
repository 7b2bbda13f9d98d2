"""Multimodal rotary positions: three for each token, of time, row and column.

Text has three equal ones that count on; the tokens of a picture have the time at which it begins
and their row and column from there; text goes on after the largest of them.

Source: Wang et al., "Qwen2-VL" (2024), section 2.1.
"""

# Shape suffixes: B = rows, T = tokens.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of a picture's tokens


class Place(NamedTuple):
    """Where a prompt has a picture: tokens `start` to `stop`."""

    picture: int
    start: int
    stop: int


def prompt_positions(rows: Sequence[Sequence[Place]], grids: Sequence[Grid], count: int) -> Tensor:
    """Positions [3, B, T] int64 of prompts of `count` tokens, padding behind them included.

    Args:
        rows: the pictures of each prompt, in order.
        grids: of each picture.
        count: T.
    """
    return torch.stack([_positions(places, grids, count) for places in rows], dim=1)


def _positions(places: Sequence[Place], grids: Sequence[Grid], count: int) -> Tensor:
    parts, token, position = [], 0, 0
    for place in places:
        height, width = grids[place.picture]
        parts.append(_text(position, place.start - token))
        position += place.start - token
        row = torch.arange(height).repeat_interleave(width)
        column = torch.arange(width).repeat(height)
        parts.append(torch.stack([torch.zeros_like(row), row, column]) + position)
        position += max(height, width)
        token = place.stop
    parts.append(_text(position, count - token))
    return torch.cat(parts, dim=1)


def _text(position: int, count: int) -> Tensor:
    return torch.arange(position, position + count).expand(3, -1)
