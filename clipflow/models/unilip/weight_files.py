"""Safetensors files: headers checked against the file's size, tensors mapped or converted.

The format: 8 bytes with the header's length, the header (a JSON object: name -> dtype, shape and
place of its bytes), then the bytes of all tensors without gaps. Nothing is executed, and nothing
is allocated for a header that says more than the file holds.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LENGTH_BYTES = 8
LONGEST_HEADER = 100_000_000
LONGEST_NAME = 300
# Converted at once: few enough that the source and the result stay in the caches.
CHUNK = 2**20
# Weights are of the first three; the others are known to skip what the model has no use for.
STORED_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `begin` is its first byte, counted from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class WeightFile:
    """One safetensors file, mapped into memory; tensors that share the map keep it alive.

    Attributes:
        tensors: name -> where it lies, from the header alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        if not path.exists():
            raise FileNotFoundError(f"load: {path} must be there, got no such file")
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise ValueError(f"load: {path} must be a file, got a folder or a device")
        try:
            with path.open("rb") as file:
                self.tensors = _read_header(file, os.fstat(file.fileno()).st_size)
                if any(stored.nbytes for stored in self.tensors.values()):
                    # Private: who writes to a tensor changes neither the file nor another model.
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError, RecursionError) as error:
            size = path.stat().st_size
            raise ValueError(
                f"load: {path} must be a whole safetensors file, got {size} bytes: {error}"
            ) from error

    def expect_reading(self) -> None:
        """Tell the system that the whole file is wanted soon."""
        self._advise("MADV_WILLNEED", 0, None)

    def mapped(self, name: str) -> Tensor:
        """The tensor without a copy: its pages are read from the file when they are touched."""
        stored = self.tensors[name]
        if self._map is None or not stored.nbytes:
            return torch.empty(stored.shape, dtype=stored.dtype)
        count, misplaced = math.prod(stored.shape), stored.begin % stored.dtype.itemsize
        if misplaced:  # odd bytes before it: kernels want whole numbers
            raw = torch.frombuffer(
                self._map, dtype=torch.uint8, count=stored.nbytes, offset=stored.begin
            )
            return raw.clone().view(stored.dtype).view(stored.shape)
        flat = torch.frombuffer(self._map, dtype=stored.dtype, count=count, offset=stored.begin)
        return flat.view(stored.shape)

    def converted(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A copy in `dtype` on `device`; pages of the file do not stay in the process for it."""
        stored, source = self.tensors[name], self.mapped(name)
        if device.type == "cpu":
            result = torch.empty(stored.shape, dtype=dtype)
            pieces = zip(result.view(-1).split(CHUNK), source.view(-1).split(CHUNK), strict=True)
            for into, piece in pieces:
                into.copy_(piece)
        else:
            result = source.to(device).to(dtype)
        self._advise("MADV_DONTNEED", stored.begin, stored.nbytes)
        return result

    def _advise(self, advice: str, begin: int, nbytes: int | None) -> None:
        """Of whole pages only; where the system knows no such advice, nothing happens."""
        if self._map is None or not hasattr(mmap, advice):
            return
        size = len(self._map) if nbytes is None else nbytes
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            with suppress(OSError):
                self._map.madvise(getattr(mmap, advice), first, last - first)


def _read_header(file, size: int) -> dict[str, StoredTensor]:
    """The tensors that the header names.

    Raises:
        ValueError: it is broken; says what is wrong.
    """
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if size < LENGTH_BYTES:
        raise ValueError("it has no header")
    start = LENGTH_BYTES + length
    if not 0 < length <= min(LONGEST_HEADER, size - LENGTH_BYTES):
        raise ValueError(f"it cannot have a header of {length} bytes")
    header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_object_once)
    if type(header) is not dict:
        raise ValueError(f"its header is no JSON object but {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = {name: _stored(name, entry, start) for name, entry in header.items()}
    _check_places(tensors, start, size)
    return tensors


def _object_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"its header has {twice[:LONGEST_NAME]!r} twice")
    return values


def _stored(name: str, entry: object, start: int) -> StoredTensor:
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"a tensor's name must be printable text, got {name[:40]!r}")
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} must have a shape and two data_offsets of whole numbers")
    dtype = STORED_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(
            f"{name} must be of {', '.join(STORED_DTYPES)}, got {entry['dtype']!r:.20}"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"{name} must have {nbytes:.6g} bytes, got data_offsets {offsets[0]:.6g} to "
            f"{offsets[1]:.6g}"
        )
    return StoredTensor(dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(value: object) -> bool:
    most = 2**60
    return isinstance(value, list) and all(type(v) is int and 0 <= v < most for v in value)


def _check_places(tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """The tensors lie one behind the other, from the header to the file's end."""
    end = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if stored.begin != end:
            raise ValueError(f"{name} must begin at byte {end}, got {stored.begin}")
        end += stored.nbytes
    if end != size:
        raise ValueError(f"it must have {end} bytes as its header says")
