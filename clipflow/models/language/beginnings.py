"""What several prompts begin with alike, tokens and pictures, so that it is read once."""

# Shape suffixes: B = rows, T = tokens, K = places for pictures.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from clipflow.errors import ShapeError
from clipflow.models.language.positions import Place


class Beginnings(NamedTuple):
    """Different beginnings of rows; their tokens are the same, their pictures are not.

    Attributes:
        tokens: how long they are.
        firsts: of each beginning a row that has it.
        of_row: of each row which beginning it has.
    """

    tokens: int
    firsts: list[int]
    of_row: list[int]


def find_places(image: Tensor, sizes: Sequence[int], pictures: Tensor | None) -> list[list[Place]]:
    """Where each row has which pictures, in order.

    Args:
        image: [B, T] bool, the image positions.
        sizes: how many of them each picture fills.
        pictures: [K] int64, as of `Reading`; None for 0, 1, ..., K - 1.

    Raises:
        ShapeError: the image positions of a row are not those of whole pictures, or `pictures` does
            not fill them.
    """
    given = list(range(len(sizes))) if pictures is None else pictures.tolist()
    rows, waiting = [], iter(given)
    for positions in [row.nonzero()[:, 0].tolist() for row in image]:
        places, filled = [], 0
        while filled < len(positions):
            picture = next(waiting, None)
            if picture is None or filled + sizes[picture] > len(positions):
                raise _misfit(image, sizes, given)
            start = positions[filled]
            filled += sizes[picture]
            places.append(Place(picture, start, positions[filled - 1] + 1))
        rows.append(places)
    if next(waiting, None) is not None:
        raise _misfit(image, sizes, given)
    return rows


def find_beginnings(
    ids: Tensor, lengths: Tensor, rows: Sequence[Sequence[Place]]
) -> Beginnings | None:
    """The longest beginnings that rows share, if reading them once is worth the trouble.

    Args:
        ids: [B, T], padded on the right.
        lengths: [B], real tokens; one at least of each row is no part of a beginning.
        rows: the pictures of each row.

    Returns:
        None where no two rows begin alike, or less than half of the longest row is shared.
    """
    tokens = int((ids == ids[:1]).all(0).long().cumprod(0).sum())
    tokens = _between_pictures(min(tokens, int(lengths.min()) - 1), rows)
    firsts: dict[tuple[Place, ...], int] = {}
    beginnings = [tuple(place for place in row if place.stop <= tokens) for row in rows]
    for row, beginning in enumerate(beginnings):
        firsts.setdefault(beginning, row)
    if len(firsts) == len(rows) or 2 * tokens < ids.shape[1]:
        return None
    order = {beginning: index for index, beginning in enumerate(firsts)}
    return Beginnings(tokens, list(firsts.values()), [order[one] for one in beginnings])


def _between_pictures(tokens: int, rows: Sequence[Sequence[Place]]) -> int:
    """The most of the first `tokens` that end in no row's picture."""
    while True:
        cut = (place.start for row in rows for place in row if place.start < tokens < place.stop)
        shorter = min(cut, default=tokens)
        if shorter == tokens:
            return tokens
        tokens = shorter


def _misfit(image: Tensor, sizes: Sequence[int], given: Sequence[int]) -> ShapeError:
    wanted = [sizes[picture] for picture in given if picture < len(sizes)]
    return ShapeError(
        f"reading: the rows must have image positions for {len(given)} pictures of {wanted}, "
        f"got {image.sum(-1).tolist()}"
    )
