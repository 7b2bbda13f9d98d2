"""Sizes that the names and shapes of a checkpoint's tensors tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

MOST_LAYERS = 1000

Shape = tuple[int, ...]


class Shapes:
    """Names and shapes of a checkpoint's tensors, under our names.

    Raises:
        ValueError: from every method, a tensor that tells a size is missing or has another form.
    """

    def __init__(self, shapes: Mapping[str, Shape], family: str) -> None:
        self._shapes, self.family = shapes, family

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def of(self, name: str, dims: int) -> Shape:
        """The shape of `name`, which must have `dims` dimensions, none of them 0."""
        found = self._shapes.get(name)
        if found is None or len(found) != dims or 0 in found:
            got = "no such tensor" if found is None else list(found)
            raise ValueError(
                f"published {self.family}: {name} must have {dims} dimensions, got {got}"
            )
        return tuple(found)

    def count(self, prefix: str) -> int:
        """How many modules there are under `prefix`; they must be numbered from 0 on."""
        numbers = self._numbers.get(prefix, set())
        if not 0 < len(numbers) <= MOST_LAYERS or max(numbers) != len(numbers) - 1:
            raise ValueError(
                f"published {self.family}: {prefix} must hold modules 0, 1, ..., got "
                f"{len(numbers)} modules up to {max(numbers, default='none')}"
            )
        return len(numbers)

    @cached_property
    def _numbers(self) -> dict[str, set[int]]:
        """Prefix, without its last dot -> the numbers of the modules under it."""
        numbers: dict[str, set[int]] = {}
        for name in self._shapes:
            for match in re.finditer(r"\.(\d{1,6})(?=\.)", name):
                numbers.setdefault(name[: match.start()], set()).add(int(match.group(1)))
        return numbers
