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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_PATTERN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
MAX_LISTED = 10


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
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        _write_weights(staging, state_dict, max_shard_size)
        text = json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
        for path in staging.iterdir():
            shutil.copymode(staging / CONFIG_FILE, path)  # safetensors makes files private
            _sync(path)
        _sync(staging)
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
    return _read_json(directory / CONFIG_FILE)


class Weights:
    """The open safetensors files of a folder; use `open_weights`.

    Attributes:
        shapes: name in the files -> shape, read from the headers alone.
    """

    def __init__(self, files: dict[str, object]) -> None:
        self._files = files
        self.shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, mapped from its file."""
        return self._files[name].get_tensor(name)


@contextmanager
def open_weights(directory: str | Path) -> Iterator[Weights]:
    """Open the weights in `directory`.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a file is truncated or no safetensors file, or holds another set of tensors
            than the index says.
    """
    directory = Path(directory)
    owners = _owners(directory)
    with ExitStack() as stack:
        files: dict[str, object] = {}
        for shard in sorted(set(owners.values())) if owners else [WEIGHTS_FILE]:
            file = _open(stack, directory / shard)
            names = set(file.keys())
            wrong = names ^ {name for name, owner in owners.items() if owner == shard}
            if owners and wrong:
                raise ValueError(
                    f"load: {directory / shard} must hold the tensors that {INDEX_FILE} says, "
                    f"got a difference in {listed(wrong)}"
                )
            files |= dict.fromkeys(names, file)
        yield Weights(files)


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


def _write_weights(folder: Path, state_dict: Mapping[str, Tensor], max_shard_size) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    plan = split_torch_state_dict_into_shards(dict(state_dict), max_shard_size=max_shard_size)
    for filename, names in plan.filename_to_tensors.items():
        shard = {name: state_dict[name].detach().cpu().contiguous() for name in names}
        save_file(shard, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _publish(staging: Path, directory: Path) -> None:
    """Move the files of `staging` into `directory`, config.json last."""
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    for old in directory.iterdir():
        if WEIGHTS_PATTERN.fullmatch(old.name):
            old.unlink()
    for new in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        os.replace(new, directory / new.name)
    _sync(directory)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _owners(directory: Path) -> dict[str, str]:
    """Tensor name -> shard, empty where the weights are one file."""
    if (directory / WEIGHTS_FILE).is_file():
        return {}
    if not (directory / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"load: {directory} must hold {WEIGHTS_FILE} or {INDEX_FILE}, got neither"
        )
    owners = _read_json(directory / INDEX_FILE).get("weight_map")
    # A shard's name with a separator would reach outside the folder.
    if not isinstance(owners, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in owners.values()
    ):
        raise ValueError(
            f"load: {directory / INDEX_FILE} must have a weight_map of file names, "
            f"got {owners!r:.80}"
        )
    return owners


def _open(stack: ExitStack, path: Path) -> safe_open:
    if not path.is_file():
        raise FileNotFoundError(f"load: {path} must be there, got no such file")
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"load: {path} must be a whole safetensors file, got {path.stat().st_size} bytes "
            f"that do not open: {error}"
        ) from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"load: {path} must be there, got no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"load: {path} must be JSON, got {error}") from error
    if type(value) is not dict:
        raise ValueError(f"load: {path} must be a JSON object, got {type(value).__name__}")
    return value
