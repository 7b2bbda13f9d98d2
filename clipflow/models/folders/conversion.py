"""Checkpoints of any file format to safetensors: what `clipflow convert` does.

file or folder -> Checkpoint (names, dtypes, shapes; tensors when asked for) -> safetensors
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clipflow.errors import InputError
from clipflow.models.folders.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    listed,
    staged_folder,
    sync,
    write_file,
    write_json,
    write_shards,
)
from clipflow.models.folders.pickle_files import read_pickle
from clipflow.models.folders.safetensors_files import (
    DTYPES,
    MAPPED_BYTES,
    PassingReader,
    Read,
    SafetensorsFile,
)

MAX_SHARD_BYTES = 2 * 10**9
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLED_SHARD = re.compile(r"pytorch_model-(\d{5})-of-(\d{5})\.bin")
# What of a model's folder goes along with its weights.
COMPANIONS = (".json", ".txt", ".jinja", ".model", ".md")
INDEX_BYTES = 64 << 20


@dataclass
class Checkpoint:
    """Tensors by name in one or several files, read when asked for.

    Attributes:
        where: the file or folder, for messages.
        specs: name -> a tensor on the meta device, of its shape and dtype.
        owners: the file that holds each.
        folder: what else of it belongs to a model, or None.
        wrappers: keys of pickles that the tensors were under.
    """

    where: Path
    key: str | None = None
    specs: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None
    wrappers: list[str] = field(default_factory=list)
    _readers: dict[Path, PassingReader] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        """Take in the names, dtypes and shapes of a file.

        Raises:
            InputError: it cannot be read, or has a name that another file has.
        """
        if path.suffix == ".safetensors":
            specs, self._readers[path] = _open_safetensors(path)
        else:
            specs, self._readers[path] = self._open_pickle(path)
        twice = [name for name in specs if name in self.owners]
        if twice:
            raise InputError(f"{path}: tensors must be in one file, got {listed(twice)} in two")
        self.specs |= specs
        self.owners |= dict.fromkeys(specs, path)

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from its file where that can be; files stay open until `release`."""
        return self._readers[self.owners[name]](name)

    def release(self) -> None:
        """Close the files that were read."""
        for reader in self._readers.values():
            reader.close()

    def _open_pickle(self, path: Path) -> tuple[dict[str, Tensor], PassingReader]:
        found = read_pickle(path, key=self.key)
        if found.wrapper is not None and found.wrapper not in self.wrappers:
            self.wrappers.append(found.wrapper)
        specs = {name: _spec(tensor.shape, tensor.dtype) for name, tensor in found.tensors.items()}

        def open_again() -> Read:
            return read_pickle(path, key=self.key).tensors.__getitem__

        return specs, PassingReader(open_again, MAPPED_BYTES if found.mapped else math.inf)


def open_checkpoint(source: Path, *, key: str | None = None) -> Checkpoint:
    """The tensors in a file (.pth, .pt, .bin, .safetensors), or in the files of a folder.

    Args:
        source: a file; or a folder with pytorch_model.bin or its shards, or with safetensors.
        key: the entry of a pickle that holds the tensors.

    Raises:
        InputError: there is no such file, or it is anything but plain tensors by name.
    """
    found = Checkpoint(source, key)
    if not source.is_dir():
        if not source.is_file():
            raise InputError(f"{source}: must be a checkpoint, got no such file")
        found.add(source)
        return found
    found.folder = source
    files, owners = _files_of(source)
    for path in files:
        found.add(path)
    wrong = {n for n in owners if found.owners.get(n, Path()).name != owners[n]}
    wrong |= set(found.owners) - set(owners) if owners else set()
    if wrong:
        raise InputError(
            f"{source}: files must hold the tensors that the index says, got a difference in "
            + listed(wrong)
        )
    return found


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    progress: bool = False,
) -> Checkpoint:
    """Write the tensors of a checkpoint as safetensors, under the same names.

    Tensors that share memory are written once each. Memory holds the file that is written (and a
    file of PyTorch's format before 1.6 as a whole).

    Args:
        source: as of `open_checkpoint`.
        out: a file ".safetensors"; or a folder, with several files and an index where it must be.
            From a folder to a folder, configuration and tokenizer files go along.
        key: the entry of a pickle that holds the tensors.
        dtype: of all floating point tensors; as they are when not given.
        max_shard_bytes: of each file in a folder.
        force: replace what is there.
        progress: show a bar, on a terminal.

    Returns:
        The checkpoint that was read.

    Raises:
        InputError: `source` is not plain tensors by name, `out` is there, or the disk is full;
            nothing is left behind.
    """
    check_output(out, force=force)
    checkpoint = open_checkpoint(source, key=key)
    specs = {
        name: spec.to(dtype) if dtype and spec.is_floating_point() else spec
        for name, spec in checkpoint.specs.items()
    }
    if out.suffix == ".safetensors":
        with _writing(out, specs, progress) as told, _whole_file(out) as path:
            read = _casting(specs, checkpoint.read)
            write_file(path, {name: read(name) for name in specs})
            told(sum(spec.nbytes for spec in specs.values()))
        checkpoint.release()
    else:
        write_model_folder(
            out,
            specs,
            checkpoint.read,
            companions=companions_of(checkpoint.folder) if checkpoint.folder else [],
            release=checkpoint.release,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    return checkpoint


def write_model_folder(
    out: Path,
    specs: Mapping[str, Tensor],
    read: Read,
    *,
    config: Mapping | None = None,
    companions: list[Path],
    release: Callable[[], object],
    max_shard_bytes: int,
    progress: bool,
) -> None:
    """Write a folder of weights with `config` as its config.json, and copies of `companions`.

    Tensors are cast to the dtypes of `specs`; `release` is called when a file is written.

    Raises:
        InputError: it cannot be written, or a value is too large for its dtype; nothing is left
            behind.
    """
    with _writing(out, specs, progress) as told, staged_folder(out) as folder:

        def after_file(count: int) -> None:
            told(count)
            release()

        write_shards(folder, specs, _casting(specs, read), max_shard_bytes, after_file=after_file)
        for path in companions:
            shutil.copyfile(path, folder / path.name)
        if config is not None:
            write_json(folder / CONFIG_FILE, dict(config))


def check_output(out: Path, *, force: bool) -> None:
    """Refuse a place that is taken, or that nothing can be written to.

    Raises:
        InputError: says which.
    """
    if out.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise InputError(f"{out}: must be a file .safetensors or a folder, got {out.suffix}")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: cannot be written: there is no folder {out.absolute().parent}")
    is_file = out.suffix == ".safetensors"
    if out.exists() and out.is_dir() == is_file:
        wanted, found = ("file", "folder") if is_file else ("folder", "file")
        raise InputError(f"{out}: must be a {wanted}, got a {found}")
    if not force and (out.exists() if is_file else out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out}: is there already; --force replaces it")


def companions_of(folder: Path, *, without: tuple[str, ...] = ()) -> list[Path]:
    """The small files of a model's folder: configuration, tokenizer, model card."""
    indices = (INDEX_FILE, *PICKLED, *without)
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in COMPANIONS and path.name not in indices
    )


@contextmanager
def _writing(
    out: Path, specs: Mapping[str, Tensor], progress: bool
) -> Iterator[Callable[[int], object]]:
    """A bar over the bytes of `specs`; a full disk is one clear error, before or during it."""
    total = sum(spec.nbytes for spec in specs.values())
    free = shutil.disk_usage(out.absolute().parent).free
    if total > free:
        raise InputError(f"{out}: needs {total} bytes, and {free} are free on the disk")
    # None: shown on a terminal, not in a log.
    shown = None if progress else True
    try:
        with tqdm(total=total, disable=shown, unit="B", unit_scale=True, desc=out.name) as bar:
            yield bar.update
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A place beside `path`, moved there after the `with` block; an error leaves nothing."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _casting(specs: Mapping[str, Tensor], read: Read) -> Read:
    """`read`, with each tensor cast to the dtype of its spec."""

    def cast(name: str) -> Tensor:
        tensor, dtype = read(name), specs[name].dtype
        result = tensor.to(dtype)
        if tensor.dtype != dtype and not torch.equal(result.isfinite(), tensor.isfinite()):
            raise InputError(f"{name}: values must fit into {dtype}, got some above its largest")
        return result

    return cast


def _spec(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _files_of(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files with weights in `folder`, and which tensors an index says they have, if any."""
    for single in (WEIGHTS_FILE, PICKLED[0]):
        if (folder / single).is_file():
            return [folder / single], {}
    for index in (INDEX_FILE, PICKLED[1]):
        if (folder / index).is_file():
            owners = _read_index(folder / index)
            return [folder / name for name in sorted(set(owners.values()))], owners
    shards = sorted(p for p in folder.iterdir() if PICKLED_SHARD.fullmatch(p.name))
    if not shards:
        raise InputError(
            f"{folder}: must hold pytorch_model.bin, its shards or safetensors, got none of them"
        )
    count = int(PICKLED_SHARD.fullmatch(shards[0].name)[2])
    wanted = [f"pytorch_model-{k:05d}-of-{count:05d}.bin" for k in range(1, count + 1)]
    if [path.name for path in shards] != wanted:
        raise InputError(
            f"{folder}: must hold all {count} shards of one checkpoint, got "
            + listed([path.name for path in shards])
        )
    return shards, {}


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > INDEX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        owners = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # A name with a separator would reach outside the folder.
        if not owners or not all(Path(shard).name == shard for shard in owners.values()):
            raise ValueError(f"{owners!r:.80}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: must have a weight_map of file names, got {error}") from error
    return owners


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], PassingReader]:
    try:
        file = SafetensorsFile(path)
    except (ValueError, OSError) as error:
        raise InputError(str(error).removeprefix("load: ")) from error
    unknown = [f"{name} ({kind})" for name, kind in file.dtypes.items() if isinstance(kind, str)]
    if unknown:
        raise InputError(f"{path}: tensors must be of {', '.join(DTYPES)}, got {listed(unknown)}")
    specs = {name: _spec(shape, file.dtypes[name]) for name, shape in file.shapes.items()}
    return specs, file.passing
