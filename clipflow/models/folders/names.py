"""Names of a checkpoint's tensors, mapped to a family's own by a table of prefixes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """What the names of a family's checkpoints mean.

    Attributes:
        prefixes: (prefix in the file, our prefix); the first row that fits is taken, and a name
            that fits none is ours.
        skipped: beginnings of our names of what checkpoints hold besides the model.
        skipped_ends: the same, of tables that are computed.
    """

    prefixes: tuple[tuple[str, str], ...]
    skipped: tuple[str, ...] = ()
    skipped_ends: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def own_name(self, name: str) -> str:
        """Our name of the parameter called `name` in a checkpoint."""
        for found, own in self.prefixes:
            if name.startswith(found):
                return own + name.removeprefix(found)
        return name

    def map_names(self, names: Iterable[str]) -> dict[str, str]:
        """Our name -> name in the checkpoint, of all tensors.

        Raises:
            ValueError: two names of the checkpoint mean the same parameter.
        """
        mapped: dict[str, str] = {}
        for name in names:
            own = self.own_name(name)
            if own in mapped:
                raise ValueError(
                    f"checkpoint: every parameter must be there once, got {mapped[own]!r} and "
                    f"{name!r}"
                )
            mapped[own] = name
        return mapped

    def kept(self, mapped: dict[str, str]) -> dict[str, str]:
        """Those of `map_names` that `skipped_names` does not count."""
        return {own: name for own, name in mapped.items() if self._skipped_as(own) is None}

    def skipped_names(self, names: Iterable[str]) -> dict[str, int]:
        """What a checkpoint holds besides the model -> in how many tensors."""
        counts: dict[str, int] = {}
        for name in names:
            part = self._skipped_as(self.own_name(name))
            if part is not None:
                counts[part] = counts.get(part, 0) + 1
        return counts

    def _skipped_as(self, own: str) -> str | None:
        for part in self.skipped:
            if own.startswith(part):
                return part.rstrip(".")
        for end in self.skipped_ends:
            if own.endswith(end):
                return end.lstrip(".")
        return None
