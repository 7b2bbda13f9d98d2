"""Strict construction of nested configuration dataclasses from JSON values."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def build(cls: type[T], values: object, where: str) -> T:
    """An instance of the dataclass `cls` from the JSON object `values`; lists become tuples.

    Fields may be int, float, bool, str, tuples of these, dataclasses, and any of these or None;
    one with a default may be missing.

    Raises:
        ValueError: unknown or missing keys or values of a wrong type; one error, beginning with
            `where`, names them all.
    """
    problems: list[str] = []
    result = _dataclass(cls, values, "", problems)
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return result


def _dataclass(cls: type, values: object, path: str, problems: list[str]) -> object:
    if not isinstance(values, Mapping):
        problems.append(f"{path or 'the file'} must be an object, got {_show(values)}")
        return None
    hints = typing.get_type_hints(cls)
    prefix = f"{path}." if path else ""
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = [prefix + str(key) for key in values if key not in names]
    missing = [
        prefix + field.name
        for field in dataclasses.fields(cls)
        if field.name not in values and field.default is dataclasses.MISSING
    ]
    if unknown:
        problems.append(f"unknown keys {unknown}")
    if missing:
        problems.append(f"missing keys {missing}")
    before = len(problems)
    fields = {
        name: _value(hints[name], values[name], prefix + name, problems)
        for name in names
        if name in values
    }
    return None if missing or len(problems) > before else cls(**fields)


def _value(kind: object, value: object, path: str, problems: list[str]) -> object:
    if isinstance(kind, types.UnionType):  # `X | None`
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, path, problems)
    if isinstance(kind, types.GenericAlias):
        return _tuple(kind, value, path, problems)
    # bool is a subclass of int, and JSON writers drop the point of whole floats.
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        problems.append(f"{path} must be {kind.__name__}, got {_show(value)}")
    return value


def _tuple(kind: types.GenericAlias, value: object, path: str, problems: list[str]) -> object:
    items = typing.get_args(kind)
    if not isinstance(value, list | tuple):
        problems.append(f"{path} must be a list, got {_show(value)}")
        return None
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        problems.append(f"{path} must have {len(items)} entries, got {len(value)}")
        return None
    return tuple(
        _value(item, entry, f"{path}[{i}]", problems)
        for i, (item, entry) in enumerate(zip(items, value, strict=True))
    )


def _show(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
