"""Arguments that may be one thing or a list of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clipflow.errors import InputError


def is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def listed(value: object) -> list:
    values = list(value) if is_list(value) else [value]
    if not values:
        raise InputError("prompt and image must not be an empty list")
    return values


def broadcast(
    name: str,
    value: str | Sequence[str] | None,
    count: int,
    check: Callable[[str, object], str],
) -> list[str] | list[None]:
    values = list(value) if is_list(value) else [value] * count
    if len(values) != count:
        raise InputError(f"{name} must be one text or a list of {count}, got {len(values)}")
    return [text if not text or not text.strip() else check(name, text) for text in values]


def paired(images: list, texts: list) -> tuple[list, list]:
    """Repeat the single one of the two lists to the length of the other."""
    count = max(len(images), len(texts))
    if len(images) not in (1, count) or len(texts) not in (1, count):
        raise InputError(
            f"images and texts must be as many, or one of either, "
            f"got {len(images)} images and {len(texts)} texts"
        )
    return images * (count // len(images)), texts * (count // len(texts))


def positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
