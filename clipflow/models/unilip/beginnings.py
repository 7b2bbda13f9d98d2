"""What several prompts begin with alike, tokens and pictures, so that it is read once."""

# Shape suffixes: B = rows, T = tokens, P = pictures, N = image positions of one, H = LM width.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from clipflow.errors import ShapeError


class Beginnings(NamedTuple):
    """Different beginnings of rows; their tokens are the same, their pictures are not.

    Attributes:
        tokens: how long they are.
        pictures: how many are in each.
        firsts: of each beginning a row that has it.
        of_row: of each row which beginning it has.
    """

    tokens: int
    pictures: int
    firsts: list[int]
    of_row: list[int]


def pictures_of_rows(
    places: Tensor, features: Tensor, pictures: Tensor | None
) -> list[tuple[int, ...]]:
    """Which pictures each row has, in order.

    Args:
        places: [B, T] bool, the image positions.
        features: [P, N, H].
        pictures: [K] int64, as of `Reading`; None for 0, 1, ..., P - 1.

    Raises:
        ShapeError: the image positions of a row are not those of whole pictures, or `pictures` does
            not fill them.
    """
    given = list(range(len(features))) if pictures is None else pictures.tolist()
    each = places.sum(-1).tolist()
    width = features.shape[1]
    if any(count % width for count in each) or sum(each) != width * len(given):
        raise ShapeError(
            f"reading: the rows must have {width} image positions for each of {len(given)} "
            f"pictures, got {each}"
        )
    rows, start = [], 0
    for count in each:
        rows.append(tuple(given[start : start + count // width]))
        start += count // width
    return rows


def find_beginnings(
    ids: Tensor, places: Tensor, lengths: Tensor, seen: Sequence[tuple[int, ...]], width: int
) -> Beginnings | None:
    """The longest beginnings that rows share, if reading them once is worth the trouble.

    Args:
        ids: [B, T], padded on the right.
        places: [B, T] bool, the image positions.
        lengths: [B], real tokens; one at least of each row is no part of a beginning.
        seen: the pictures of each row.
        width: image positions of one picture.

    Returns:
        None where no two rows begin alike, or less than half of the longest row is shared.
    """
    tokens = int((ids == ids[:1]).all(0).long().cumprod(0).sum())
    tokens = min(tokens, int(lengths.min()) - 1)
    inside = places[0, :tokens].long().cumsum(0)
    count = int(inside[-1]) if tokens else 0
    if count % width:  # no beginning ends in a picture
        tokens = int((inside <= count - count % width).sum())
    pictures = count // width
    firsts: dict[tuple[int, ...], int] = {}
    for row, of_row in enumerate(seen):
        firsts.setdefault(of_row[:pictures], row)
    if len(firsts) == len(seen) or 2 * tokens < ids.shape[1]:
        return None
    order = {beginning: index for index, beginning in enumerate(firsts)}
    of_row = [order[row[:pictures]] for row in seen]
    return Beginnings(tokens, pictures, list(firsts.values()), of_row)
