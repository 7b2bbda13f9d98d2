"""Configurations that a folder's config.json holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from clipflow.models.folders.parsing import build

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class SavedConfig:
    """What frozen dataclasses of sizes have in common.

    Attributes:
        model_type: what config.json calls them.
        called: what errors call them.
    """

    model_type: ClassVar[str]
    called: ClassVar[str]

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping) -> Self:
        """The configuration that `to_dict` wrote; lists become tuples.

        Raises:
            ValueError: unknown or missing keys, values of a wrong type, another model type; one
                error names them all.
        """
        values = dict(values)
        found = values.pop("model_type", None)
        if found != cls.model_type:
            raise ValueError(f"{cls.called}: model_type must be {cls.model_type!r}, got {found!r}")
        return build(cls, values, cls.called)
