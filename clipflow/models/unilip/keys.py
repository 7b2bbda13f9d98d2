"""Parameter names of published UniLIP checkpoints, mapped to ours by one table of prefixes.

Ours are the reference's in-memory names without the leading "model." (specs section 5.1). Files
come with those names, or with the language model, the vision tower and its projector renamed by
transformers' reverse mapping, or with ours.
"""

from __future__ import annotations

from collections.abc import Iterable

LM_HEAD = "lm_head.weight"

# (prefix in the file, our prefix); the first row that fits is taken.
PREFIXES = (
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.", ""),
)


def own_name(name: str) -> str:
    """Our name of the parameter called `name` in a checkpoint."""
    for found, own in PREFIXES:
        if name.startswith(found):
            return own + name.removeprefix(found)
    return name


def map_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> name in the checkpoint.

    Raises:
        ValueError: two names of the checkpoint mean the same parameter.
    """
    mapped: dict[str, str] = {}
    for name in names:
        own = own_name(name)
        if own in mapped:
            raise ValueError(
                f"checkpoint: every parameter must be there once, got {mapped[own]!r} and {name!r}"
            )
        mapped[own] = name
    return mapped
