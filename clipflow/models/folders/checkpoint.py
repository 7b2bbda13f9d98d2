"""Folders of a model: config.json beside safetensors files in Hugging Face's layout.

A folder holds `model.safetensors`, or `model-00001-of-0000N.safetensors` ... with
`model.safetensors.index.json`. Other files in it (tokenizer, preprocessor) are left alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from clipflow.models.folders.safetensors_files import Read, SafetensorsFile

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_PATTERN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
MAX_LISTED = 10
LARGEST_JSON = 64 * 2**20


def save_folder(
    directory: str | Path,
    config: Mapping,
    state_dict: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "2GB",
) -> None:
    """Write `config` and `state_dict` into `directory`, made if it is missing.

    All files are written and synced in a folder inside, then moved: an error or a full disk leaves
    the directory as it was. A crash within the moves leaves it without config.json, which does not
    load, never with weights of two models.

    Raises:
        NotADirectoryError: `directory` is a file.
        OSError: nothing could be written.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save: directory must be a folder, got the file {directory}")
    with staged_folder(directory) as staging:
        write_shards(
            staging, state_dict, lambda name: state_dict[name].detach().cpu(), max_shard_size
        )
        write_json(staging / CONFIG_FILE, dict(config))


@contextmanager
def staged_folder(directory: Path) -> Iterator[Path]:
    """An empty folder, whose files are synced and moved into `directory` after the `with` block.

    An error leaves `directory` as it was, or does not make it. Weights that are there give way, and
    files of the same names; others stay. config.json goes first and comes last, so that a crash
    between two moves leaves a folder that does not load.
    """
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        yield staging
        for path in (*staging.iterdir(), staging):
            sync(path)
        _publish(staging, directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty: another process writes there too
                directory.rmdir()
        raise
    shutil.rmtree(staging)


def read_config(directory: str | Path) -> dict:
    """The JSON object of `directory`/config.json.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: config.json is not a JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"load: model must be a folder, got {str(directory)!r}")
    return read_json(directory / CONFIG_FILE)


class Weights:
    """The safetensors files of a folder; use `open_weights`.

    Attributes:
        files: name of a tensor -> the file that holds it.
        shapes: name -> shape, read from the headers alone.
        dtypes: name -> dtype that it is stored in, as of `SafetensorsFile`.
    """

    def __init__(self, files: Mapping[str, SafetensorsFile]) -> None:
        self.files = files
        self.shapes = {name: file.shapes[name] for name, file in files.items()}
        self.dtypes = {name: file.dtypes[name] for name, file in files.items()}

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The tensor called `name`: mapped from its file if that is all, else converted.

        Args:
            name: in the files.
            dtype: wanted; as stored when not given.
            device: wanted.
        """
        dtype, device = dtype or self.dtypes[name], torch.device(device)
        if device.type == "cpu" and dtype == self.dtypes[name]:
            return self.files[name].mapped(name)
        return self.files[name].passing(name).to(device).to(dtype)


def open_weights(
    directory: str | Path, *, weights_file: str = WEIGHTS_FILE, index_file: str = INDEX_FILE
) -> Weights:
    """Open the weights in `directory`; of them only the headers are read.

    Args:
        directory: the folder.
        weights_file: name of the file with all weights.
        index_file: name of the index of several files, which is asked for where there is none.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a file is truncated or no safetensors file, or holds another set of tensors than
            the index says.
    """
    directory = Path(directory)
    owners = _owners(directory, weights_file, index_file)
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(owners.values())) if owners else [weights_file]:
        file = SafetensorsFile(directory / shard)
        wrong = set(file.shapes) ^ {name for name, owner in owners.items() if owner == shard}
        if owners and wrong:
            raise ValueError(
                f"load: {directory / shard} must hold the tensors that {index_file} says, "
                f"got a difference in {listed(wrong)}"
            )
        files |= dict.fromkeys(file.shapes, file)
    return Weights(files)


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare names and shapes of a model's parameters with those of a checkpoint.

    Raises:
        ValueError: they differ; one error counts all differences and lists the first 10.
    """
    problems = [f"{name}: missing" for name in wanted if name not in found]
    problems += [f"{name}: unknown" for name in found if name not in wanted]
    problems += [
        f"{name}: must have shape {list(shape)}, got {list(found[name])}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        raise ValueError(
            f"load: {where} must hold the model's parameters, got {len(problems)} differences: "
            + listed(problems)
        )


def listed(items: list[str] | set[str]) -> str:
    """At most 10 of `items`, and how many more there are."""
    items = sorted(items) if isinstance(items, set) else items
    more = f"; and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return "; ".join(items[:MAX_LISTED]) + more


def write_shards(
    folder: Path,
    planned: Mapping[str, Tensor],
    read: Read,
    max_shard_size: int | str,
    *,
    after_file: Callable[[int], object] = lambda count: None,
) -> None:
    """Write tensors into an empty folder, with an index where they need several files.

    Memory holds the tensors of one file at a time.

    Args:
        folder: an empty one.
        planned: name -> a tensor of the shape and dtype that will be written; "meta" will do.
        read: gives a tensor by name; called once for each.
        max_shard_size: bytes of each file, or text like "2GB"; a larger tensor has its own.
        after_file: told the bytes of tensors in a file that is written.

    Raises:
        OSError: a file cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(dict(planned), max_shard_size=max_shard_size)
    for filename, names in plan.filename_to_tensors.items():
        write_file(folder / filename, {name: read(name) for name in names})
        after_file(sum(planned[name].nbytes for name in names))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX_FILE, index)


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; tensors that share memory are written once each.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(_apart(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)  # safetensors makes files private


def write_json(path: Path, value: object) -> None:
    """Write a value as an indented JSON file."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each contiguous and none in the memory of another."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = (tensor.clone() if place in places else tensor).contiguous()
        places.add(place)
    return found


def _publish(staging: Path, directory: Path) -> None:
    """Move the files of `staging` into `directory`, config.json last."""
    if (staging / CONFIG_FILE).exists():
        (directory / CONFIG_FILE).unlink(missing_ok=True)
    for old in directory.iterdir():
        if WEIGHTS_PATTERN.fullmatch(old.name):
            old.unlink()
    for new in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        os.replace(new, directory / new.name)
    sync(directory)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _owners(directory: Path, weights_file: str, index_file: str) -> dict[str, str]:
    """Tensor name -> shard, empty where the weights are one file."""
    if (directory / weights_file).is_file():
        return {}
    if not (directory / index_file).is_file():
        raise FileNotFoundError(
            f"load: {directory} must hold {weights_file} or {index_file}, got neither"
        )
    owners = read_json(directory / index_file).get("weight_map")
    # A shard's name with a separator would reach outside the folder.
    if not isinstance(owners, dict) or not owners or not all(map(_is_file_name, owners.values())):
        raise ValueError(
            f"load: {directory / index_file} must have a weight_map of file names, "
            f"got {repr(owners)[:80]}"
        )
    for shard in set(owners.values()):
        _check_inside(directory, shard)
    return owners


def _is_file_name(shard: object) -> bool:
    return isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard != ".."


def _check_inside(directory: Path, shard: str) -> None:
    """A shard that is a link must not lead out of the folder, but for the hub's own cache."""
    folder, found = directory.resolve(), (directory / shard).resolve()
    caches = [path.parent for path in folder.parents if path.name == "snapshots"]
    blobs = caches[0] / "blobs" if caches else folder
    if found.parent not in (folder, blobs):
        raise ValueError(f"load: {directory / shard} must be in the folder, got a link out of it")


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a JSON object, or larger than any that a model needs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"load: {path} must be there, got no such file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"load: {path} must be JSON, got {path.stat().st_size} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ValueError(f"load: {path} must be JSON, got {error}") from error
    if type(value) is not dict:
        raise ValueError(f"load: {path} must be a JSON object, got {type(value).__name__}")
    return value
