"""What writing a folder with random weights takes, whatever the family."""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clipflow.errors import InputError
from clipflow.models.folders.checkpoint import write_shards
from clipflow.testing.random_weights import RandomWeights

# Name -> shape and dtype.
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]

SPARE_BYTES = 16_000_000  # for the tokenizer and headers
SHOW_PROGRESS_FROM = 2**28  # bytes


@contextmanager
def new_folder(directory: Path, size: str, wanted: int) -> Iterator[Path]:
    """A folder to write into, which becomes `directory` after the `with` block.

    Args:
        directory: not there yet, or empty.
        size: what is asked for, for errors.
        wanted: bytes of weights that will be written.

    Raises:
        InputError: the folder is not empty, or the disk has not the room.
        OSError: it cannot be made.
    """
    _check_place(directory, size, wanted)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.parent / f".{directory.name}-{secrets.token_hex(4)}"
    try:
        staging.mkdir()
        yield staging
        os.replace(staging, directory)  # an empty folder there gives way
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


class PlannedWeights:
    """Random weights that are made while they are written, one file at a time.

    Args:
        planned: name in the files -> shape and dtype.
        names: name in the files -> ours, which says how the weights are drawn; others are drawn by
            their own.
        seed: the same gives the same bytes.
    """

    def __init__(self, planned: Tensors, names: Mapping[str, str], seed: int) -> None:
        self._planned, self._names, self._weights = planned, names, RandomWeights(seed)

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._planned.values())

    def write(
        self, folder: Path, max_shard_size: int | str = "2GB", progress: bool | None = None
    ) -> None:
        """Write them into `folder`; a bar is shown from 0.25 GB on if `progress` does not say."""
        meta = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in self._planned.items()
        }
        total = self.nbytes
        hidden = not progress if progress is not None else total < SHOW_PROGRESS_FROM
        with tqdm(total=total, unit="B", unit_scale=True, disable=hidden) as bar:
            write_shards(folder, meta, self._read, max_shard_size, after_file=bar.update)

    def _read(self, name: str) -> Tensor:
        return self._weights.tensor(self._names.get(name, name), *self._planned[name])


def _check_place(directory: Path, size: str, wanted: int) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        what = "a folder with files in it" if directory.is_dir() else "a file"
        raise InputError(f"{directory}: must be a new or empty folder, got {what}")
    above = next(folder for folder in directory.absolute().parents if folder.exists())
    free = shutil.disk_usage(above).free
    if free < wanted + SPARE_BYTES:
        raise InputError(
            f"{directory}: size {size!r} must have {wanted / 1e9:.2f} GB on the disk, "
            f"got {free / 1e9:.2f} GB free"
        )
