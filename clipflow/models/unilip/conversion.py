"""Checkpoints of any file format to safetensors: what `clipflow convert` does.

file or folder -> Checkpoint (names, dtypes, shapes; tensors when asked for) -> safetensors
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from clipflow.errors import InputError
from clipflow.models.unilip.checkpoint import INDEX_FILE, WEIGHTS_FILE, listed, staged_folder
from clipflow.models.unilip.pickle_files import read_pickle
from clipflow.models.unilip.safetensors_writing import (
    DTYPES,
    Progress,
    Spec,
    copy_files,
    whole_file,
    write_file,
    write_text,
    write_weights,
)

MAX_SHARD_BYTES = 2 * 10**9
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLED_SHARD = re.compile(r"pytorch_model-(\d{5})-of-(\d{5})\.bin")
# A mapped file is opened anew after so much of it was read, so that its pages leave the process.
MAPPED_BYTES = 1 << 28
# What of a model's folder goes along with its weights.
COMPANIONS = (".json", ".txt", ".jinja", ".model", ".md")
INDEX_BYTES = 64 << 20


@dataclass
class _Opened:
    """A file that is being read: what is in it, and how much of it was read."""

    specs: dict[str, Spec]
    tensor: Callable[[str], Tensor]
    mapped: bool
    read_bytes: int = 0


@dataclass
class Checkpoint:
    """Tensors by name in one or several files, read when asked for.

    Attributes:
        where: the file or folder, for messages.
        specs: dtype and shape of every tensor.
        owners: the file that holds each.
        folder: what else of it belongs to a model, or None.
        wrappers: keys of pickles that the tensors were under.
    """

    where: Path
    key: str | None = None
    specs: dict[str, Spec] = field(default_factory=dict)
    owners: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None
    wrappers: list[str] = field(default_factory=list)
    _opened: dict[Path, _Opened] = field(default_factory=dict)

    def add(self, path: Path) -> None:
        """Take in the names, dtypes and shapes of a file.

        Raises:
            InputError: it cannot be read, or has a name that another file has.
        """
        specs = self._open(path).specs
        twice = [name for name in specs if name in self.owners]
        if twice:
            raise InputError(f"{path}: tensors must be in one file, got {listed(twice)} in two")
        self.specs |= specs
        self.owners |= dict.fromkeys(specs, path)

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from its file where that can be; files stay open until `release`."""
        path = self.owners[name]
        opened = self._opened.pop(path, None) or self._open(path)
        opened.read_bytes += opened.specs[name].nbytes
        if not opened.mapped or opened.read_bytes <= MAPPED_BYTES:
            self._opened[path] = opened
        return opened.tensor(name)

    def release(self) -> None:
        """Close the files that were read."""
        self._opened.clear()

    def _open(self, path: Path) -> _Opened:
        if path.suffix == ".safetensors":
            return _open_safetensors(path)
        found = read_pickle(path, key=self.key)
        if found.wrapper is not None and found.wrapper not in self.wrappers:
            self.wrappers.append(found.wrapper)
        specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in found.tensors.items()}
        return _Opened(specs, found.tensors.__getitem__, found.mapped)


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
        found.release()
        return found
    found.folder = source
    files, owners = _files_of(source)
    for path in files:
        found.add(path)
        found.release()
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

    Tensors that share memory are written once each. Memory holds a piece of one tensor (and a file
    of PyTorch's format before 1.6 as a whole).

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
    specs = {name: _cast(spec, dtype) for name, spec in checkpoint.specs.items()}
    if out.suffix == ".safetensors":
        with _writing(out, specs, progress) as told, whole_file(out) as path:
            write_file(path, specs, checkpoint.read, told)
    else:
        with _writing(out, specs, progress) as told, staged_folder(out) as folder:
            _write_folder(folder, specs, checkpoint, told, max_shard_bytes)
    checkpoint.release()
    return checkpoint


def write_model_folder(
    out: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], Tensor],
    *,
    config: Mapping | None = None,
    companions: list[Path],
    release: Callable[[], object],
    max_shard_bytes: int,
    progress: bool,
) -> None:
    """Write a folder of weights with `config` as its config.json, and copies of `companions`.

    Raises:
        InputError: it cannot be written; nothing is left behind.
    """
    with _writing(out, specs, progress) as told, staged_folder(out) as folder:
        write_weights(
            folder, specs, read, max_bytes=max_shard_bytes, progress=told, after_file=release
        )
        copy_files(companions, folder)
        if config is not None:
            text = json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
            write_text(folder / "config.json", text)


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


def _write_folder(
    folder: Path,
    specs: Mapping[str, Spec],
    checkpoint: Checkpoint,
    told: Progress,
    max_bytes: int,
) -> None:
    write_weights(
        folder,
        specs,
        checkpoint.read,
        max_bytes=max_bytes,
        progress=told,
        after_file=checkpoint.release,
    )
    if checkpoint.folder is not None:
        copy_files(companions_of(checkpoint.folder), folder)


@contextmanager
def _writing(out: Path, specs: Mapping[str, Spec], progress: bool) -> Iterator[Progress]:
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


def _cast(spec: Spec, dtype: torch.dtype | None) -> Spec:
    return spec if dtype is None or not spec.dtype.is_floating_point else Spec(dtype, spec.shape)


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


def _open_safetensors(path: Path) -> _Opened:
    try:
        file = safe_open(path, framework="pt")
        names = {kind: dtype for dtype, kind in DTYPES.items()}
        specs = {}
        for name in file.keys():
            piece = file.get_slice(name)
            kind = piece.get_dtype()
            if kind not in names:
                raise InputError(f"{path}: {name} must be of {listed(list(names))}, got {kind}")
            specs[name] = Spec(names[kind], tuple(piece.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: must be a whole safetensors file, got {error}") from error
    return _Opened(specs, file.get_tensor, mapped=True)
