"""Checkpoints that survive `kill -9`: written beside, checked by hash, renamed, never pickled.

A checkpoint is a folder `step-000123` of safetensors files and a `manifest.json`, written last,
with the size and SHA-256 of each. It is built in `step-000123.tmp-<pid>` and renamed when every
byte is on the disk, so a folder without the suffix is whole; the hashes catch later damage.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
_WHOLE = re.compile(r"step-(\d+)")
_HALF_WRITTEN = re.compile(r"step-\d+\.(tmp|old)-\d+")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run between two steps.

    Attributes:
        step: optimizer steps done.
        elapsed: seconds trained so far, over all pieces of the run.
        tensors: file name without suffix -> tensor name -> tensor.
        facts: anything JSON can hold.
    """

    step: int
    elapsed: float
    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, snapshot: Snapshot, *, keep: int = 2) -> Path:
    """Write `snapshot` to `folder/step-...`, then remove all but the newest `keep` checkpoints.

    Raises:
        OSError: the disk is full or not writable. Nothing half-written is left.
    """
    final = folder / f"step-{snapshot.step:06d}"
    size = sum(t.nbytes for part in snapshot.tensors.values() for t in part.values())
    with writing(final, size) as building:
        files = {}
        for name, tensors in snapshot.tensors.items():
            path = building / f"{name}.safetensors"
            save_file({key: _storable(t) for key, t in tensors.items()}, path)
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest = {
            "format": FORMAT,
            "step": snapshot.step,
            "elapsed": snapshot.elapsed,
            "files": files,
            "facts": snapshot.facts,
        }
        (building / MANIFEST).write_text(json.dumps(manifest))
    _prune(folder, keep)
    return final


def load(folder: Path) -> Snapshot | None:
    """The newest whole checkpoint in `folder`, on the CPU; None if there is none.

    Damaged and half-written folders are passed over, each with a warning that says why.
    """
    if not folder.is_dir():
        return None
    for path in folder.iterdir():
        if _HALF_WRITTEN.fullmatch(path.name):
            _log.warning("checkpoint: %s is half-written, passed over", path)
    for path in reversed(_checkpoints(folder)):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _log.warning("checkpoint: %s is damaged (%s), passed over", path, error)
    return None


@contextmanager
def writing(final: Path, size: int = 0) -> Iterator[Path]:
    """Build a folder beside its place and move it there whole, replacing what is there.

    Args:
        final: where the folder shall be. Its parent is made where it is missing.
        size: bytes about to be written, to refuse before writing where the disk is too full.

    Yields:
        The folder to write to.

    Raises:
        OSError: one line that names the folder and the reason; the half-built folder is removed.
    """
    building = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_room(final.parent, size)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        yield building
        _move(building, final)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(number, f"cannot write {final}: {reason}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def sha256(path: Path) -> str:
    """The hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seed_generators(seed: int) -> None:
    """Seed PyTorch's, NumPy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def rng_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of PyTorch's, NumPy's and Python's global generators: (tensors, JSON facts)."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *position = np.random.get_state()
    version, internal, gauss = random.getstate()
    facts = {"numpy": [kind, keys.tolist(), *position], "python": [version, list(internal), gauss]}
    return tensors, facts


def set_rng_state(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device
) -> None:
    """Put the global generators where `rng_state` found them."""
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    kind, keys, *position = facts["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *position))
    version, internal, gauss = facts["python"]
    random.setstate((version, tuple(internal), gauss))


def _read(path: Path) -> Snapshot:
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {manifest['format']}")
    for name, fact in manifest["files"].items():
        size = (path / name).stat().st_size
        if size != fact["bytes"]:
            raise ValueError(f"{name} must have {fact['bytes']} bytes, got {size}")
        if sha256(path / name) != fact["sha256"]:
            raise ValueError(f"{name} does not match its SHA-256")
    tensors = {Path(name).stem: load_file(path / name) for name in manifest["files"]}
    return Snapshot(manifest["step"], manifest["elapsed"], tensors, manifest["facts"])


def _checkpoints(folder: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, oldest step first."""
    found = [path for path in folder.iterdir() if _WHOLE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_WHOLE.fullmatch(path.name).group(1)))


def _prune(folder: Path, keep: int) -> None:
    """Remove old checkpoints, and what killed runs left half-written."""
    half_written = [p for p in folder.iterdir() if _HALF_WRITTEN.fullmatch(p.name)]
    for path in (*_checkpoints(folder)[:-keep], *half_written):
        shutil.rmtree(path, ignore_errors=True)


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        needed, left = size / 1e6, free / 1e6
        raise OSError(errno.ENOSPC, f"disk full: {needed:.0f} MB needed, {left:.0f} MB free")


def _move(building: Path, final: Path) -> None:
    """Put a finished folder in its place once it is on the disk."""
    for path in (*building.rglob("*"), building):
        _sync(path)
    old = final.with_name(f"{final.name}.old-{os.getpid()}")
    if final.exists():
        os.replace(final, old)
    os.replace(building, final)
    _sync(final.parent)
    for stale in final.parent.glob(f"{final.name}.*-*"):  # of this and of killed runs
        shutil.rmtree(stale, ignore_errors=True)


def _storable(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _sync(path: Path) -> None:
    """Force a file or folder onto the disk, so that the rename never overtakes its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
