"""What the sizes of a configuration must be, and what is said where they are not.

A rule is (what is wanted and what was found, whether it is violated).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

LARGEST = 1e12
NOISE_DTYPES = ("float32", "bfloat16", "float16")

Rule = tuple[str, bool]


def check_rules(rules: Iterable[Rule], where: str) -> None:
    """Refuse what violates any rule.

    Raises:
        ValueError: one error, beginning with `where`, names all that are violated.
    """
    problems = [text for text, wrong in rules if wrong]
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))


def positive(numbers: Mapping[str, object]) -> list[Rule]:
    """Every number must be above zero and finite; what is no number is left alone."""
    return [
        (f"{name} must be above 0 and below {LARGEST:.0e}, got {value}", not 0 < value < LARGEST)
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def multiple(name: str, value: int, of: int) -> Rule:
    """`value` must be a multiple of `of`; another rule refuses an `of` of 0."""
    return (f"{name} must be a multiple of {of}, got {value}", of > 0 and value % of != 0)


def token_ids(tokens: Mapping[str, int], vocab_size: int) -> Rule:
    """Ids must be in the vocabulary, or -1 for a token that it does not have."""
    outside = {name: number for name, number in tokens.items() if not -1 <= number < vocab_size}
    return (f"tokens must be below vocab_size {vocab_size}, got {outside}", bool(outside))


def image_mean(mean: tuple[float, ...]) -> Rule:
    """The mean that pixels are normalized with must be finite."""
    return (f"image_mean must be finite, got {list(mean)}", not all(map(math.isfinite, mean)))


def noise_dtype(name: str) -> Rule:
    """Noise must be drawn in a known dtype."""
    return (
        f"noise_dtype must be one of {list(NOISE_DTYPES)}, got {name!r}",
        name not in NOISE_DTYPES,
    )
