"""Write safetensors tensor by tensor, so that memory holds one piece of one of them.

The format: 8 bytes with the header's length, a JSON header with dtype, shape and place of each
tensor, then their bytes. Folders are in Hugging Face's layout, with an index where there are
several files. Everything is written elsewhere first and moved when it is whole.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipflow.errors import InputError
from clipflow.models.unilip.checkpoint import INDEX_FILE, WEIGHTS_FILE

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT = 8
PIECE = 1 << 22  # values that are cast and written at once

Read = Callable[[str], Tensor]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, specs: Mapping[str, Spec], read: Read, progress: Progress) -> None:
    """Write one safetensors file.

    Args:
        path: a new file.
        specs: of each tensor; they are cast to these dtypes.
        read: gives a tensor by name; called once for each.
        progress: told how many bytes of tensors were written.

    Raises:
        InputError: a value is too large for the dtype that it is cast to.
        OSError: the file cannot be written.
    """
    # Wide values first, so that all are aligned.
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        spec, begin = specs[name], end
        end += spec.nbytes
        kind, shape = DTYPES[spec.dtype], list(spec.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in _pieces(name, read(name), specs[name].dtype):
                file.write(piece)
                progress(len(piece))
        file.flush()
        os.fsync(file.fileno())


def plan_files(specs: Mapping[str, Spec], max_bytes: int) -> dict[str, list[str]]:
    """File name -> its tensors, in the order of `specs`, each file of at most `max_bytes`.

    A tensor that is larger has a file of its own.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    count = len(groups)
    return {f"model-{k:05d}-of-{count:05d}.safetensors": g for k, g in enumerate(groups, 1)}


def write_weights(
    folder: Path,
    specs: Mapping[str, Spec],
    read: Read,
    *,
    max_bytes: int,
    progress: Progress,
    after_file: Callable[[], object] = lambda: None,
) -> None:
    """Write tensors into an empty folder, with an index where they need several files.

    `after_file` is called when a file is whole; the other arguments are those of `write_file`.
    """
    plan = plan_files(specs, max_bytes)
    for filename, names in plan.items():
        write_file(folder / filename, {name: specs[name] for name in names}, read, progress)
        after_file()
    if len(plan) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {name: filename for filename, names in plan.items() for name in names},
        }
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a new text file and wait until it is on the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside `path`, moved there after the `with` block; an error leaves nothing."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def copy_files(files: Sequence[Path], folder: Path) -> None:
    """Copy small files (configuration, tokenizer) into `folder`, under their names."""
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _pieces(name: str, tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of `tensor` as `dtype`, in order."""
    for piece in tensor.detach().contiguous().reshape(-1).split(PIECE):
        cast = piece.to(dtype)
        narrowed = cast.dtype != piece.dtype and not bool(cast.isfinite().all())
        if narrowed and not bool(cast.isfinite().eq(piece.isfinite()).all()):
            raise InputError(f"{name}: values must fit into {dtype}, got some above its largest")
        yield memoryview(cast.contiguous().view(torch.uint8).numpy()).cast("B")
