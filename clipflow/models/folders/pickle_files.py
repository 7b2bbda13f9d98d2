"""Read what `torch.save` wrote, as far as it is plain tensors by name; nothing in it is run.

Loading a model never comes here, only `clipflow convert` does. A file is refused before it is
unpickled if its archive or its pickle is anything but what `torch.save` makes of tensors; then
PyTorch's own restricted unpickler reads it; then every value is checked.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from torch import Tensor, nn

from clipflow.errors import InputError
from clipflow.models.folders.checkpoint import listed
from clipflow.models.folders.safetensors_files import DTYPES
from clipflow.sampling.memory import require_bytes

# Where trainers put the weights, beside an optimizer and counters.
WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "ema", "model_ema", "ema_state_dict",
    "ema_model", "params", "params_ema",
)  # fmt: skip
MAX_PICKLE_BYTES = 16 << 20  # names and shapes of 50000 tensors
# Copies of one tensor under several names, all together, in bytes of the file.
MAX_COPIES = 4

ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # after two bytes of protocol
LEGACY_PICKLES, LEGACY_VALUES = 5, 3  # magic number, version, system, values, storages' names
LEAST_LIMIT = 1 << 20  # numbers up to this are never too large
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257

_STORAGES = (
    "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
)  # fmt: skip
ALLOWED = frozenset(
    [
        "collections OrderedDict",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        *(f"{place} {kind}Storage" for kind in _STORAGES for place in ("torch", "torch.cuda")),
    ]
)
# What else `torch.save` writes of tensors, in words.
UNWANTED = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of a subclass",
    "_rebuild_from_type_v2": "a tensor of a subclass",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_meta_tensor_no_storage": "a tensor without data",
    "_rebuild_parameter_with_state": "a parameter with attributes",
    "ComplexFloatStorage": "a complex tensor",
    "ComplexDoubleStorage": "a complex tensor",
}
# How pickles that torch.save did not write name what they call.
OTHER_CALLS = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEWOBJ_EX")
WANTED = "must hold plain tensors by name, as torch.save(model.state_dict()) writes them"


@dataclass(frozen=True)
class PickledTensors:
    """Tensors by name, on the CPU, mapped from the file where its format allows.

    `wrapper` is the key that they were under, None where they were the whole file.
    """

    tensors: dict[str, Tensor]
    wrapper: str | None
    mapped: bool


class _File(Protocol):
    def read(self, count: int) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


def read_pickle(path: Path, *, key: str | None = None) -> PickledTensors:
    """The tensors in a file that `torch.save` wrote.

    Args:
        path: a file in PyTorch's zip format, or the one before 1.6.
        key: the entry of the file that holds the tensors; found out when not given.

    Raises:
        InputError: anything but plain dense tensors by name; says what was found.
        NotEnoughMemory: a file in the old format, which cannot be mapped, does not fit.
    """
    if not path.is_file():
        raise InputError(f"{path}: must be a checkpoint file, got {_kind(path)}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(TAR_MAGIC_AT + len(TAR_MAGIC))
    mapped = start.startswith(ZIP_START)
    if mapped:
        _check_archive(path, size)
    elif start[2:].startswith(LEGACY_START):
        _check_legacy(path)
        require_bytes(size, torch.device("cpu"), f"reading {path.name}")
    else:
        raise InputError(f"{path}: must be a file that torch.save wrote, got {_content(start)}")
    tensors, wrapper = _chosen(path, size, _load(path, mapped=mapped), key)
    return PickledTensors(tensors, wrapper, mapped)


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "no such file"


def _content(start: bytes) -> str:
    if not start:
        return "an empty file"
    if start[TAR_MAGIC_AT:] == TAR_MAGIC:
        return "the tar format of PyTorch before 0.2"
    if start[8:9] == b"{":
        return "a safetensors file (call it .safetensors)"
    return "a plain pickle" if start[:1] == b"\x80" else "something else"


def _check_archive(path: Path, size: int) -> None:
    """Refuse an archive that is not stored as torch.save does, and pickles of anything but tensors.

    Entries are never compressed, so that they are no longer than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if any(name.endswith("/constants.pkl") for name in names):
                raise InputError(f"{path}: {WANTED}, got a TorchScript model")
            packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
            if packed or sum(entry.file_size for entry in entries) > size:
                what = packed[0] if packed else "its entries"
                raise InputError(
                    f"{path}: entries must be stored as they are, got compressed {what}"
                )
            if len(set(names)) < len(names):
                raise InputError(f"{path}: entries must be there once, got some twice")
            pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1:
                raise InputError(
                    f"{path}: must hold one data.pkl as torch.save writes it, got {len(pickles)}"
                )
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                raise InputError(_too_long(path, pickles[0].file_size))
            _check_pickle(path, io.BytesIO(archive.read(pickles[0])))
    except InputError:
        raise
    except Exception as error:  # BadZipFile, EOFError, UnicodeError, struct.error, ...
        raise InputError(
            f"{path}: must be a whole zip archive, got {size} bytes: {error}"
        ) from error


def _check_legacy(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for index in range(LEGACY_PICKLES):
            _check_pickle(path, mapped, most=len(mapped) if index == LEGACY_VALUES else None)


def _check_pickle(path: Path, file: _File, *, most: int | None = None) -> None:
    """Refuse a pickle that calls anything but what rebuilds plain tensors.

    With `most`, also numbers above it: sizes of storages, which would be reserved at once.
    """
    strings: list[str] = []
    first = file.tell()
    try:
        for code, argument, position in pickletools.genops(file):
            if (position or 0) - first > MAX_PICKLE_BYTES:
                raise InputError(_too_long(path, position - first))
            if code.name == "GLOBAL" and argument not in ALLOWED:
                raise InputError(f"{path}: {WANTED}, got {_unwanted(argument)}")
            if code.name in OTHER_CALLS:
                found = _unwanted(" ".join(strings[-2:])) if strings else code.name
                raise InputError(f"{path}: {WANTED}, got {found}")
            if isinstance(argument, str):
                strings = [*strings[-1:], argument]
            if most is not None and isinstance(argument, int):
                _check_number(path, argument, max(most, LEAST_LIMIT))
    except InputError:
        raise
    except Exception as error:  # pickletools raises ValueError, KeyError, UnicodeError, ...
        raise InputError(
            f"{path}: must be a whole checkpoint, got a broken pickle: {error}"
        ) from error


def _check_number(path: Path, found: int, most: int) -> None:
    if found > most:
        raise InputError(f"{path}: must hold what it declares, got {found} values in {most} bytes")


def _unwanted(called: str) -> str:
    """In words, what a pickle calls: "module name"."""
    module, _, name = called.partition(" ")
    return UNWANTED.get(name, f"{module}.{name}")


def _too_long(path: Path, found: int) -> str:
    return (
        f"{path}: {WANTED}, got a pickle of over {MAX_PICKLE_BYTES >> 20} MiB beside the tensors "
        f"({found} bytes)"
    )


def _load(path: Path, *, mapped: bool) -> object:
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        raise InputError(f"{path}: {WANTED}, got {_first_line(error)}") from error
    except Exception as error:  # damage shows as RuntimeError, ValueError, EOFError, KeyError, ...
        raise InputError(
            f"{path}: must be a whole checkpoint, got one that cannot be read: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]:.200}" if lines else type(error).__name__


def _chosen(
    path: Path, size: int, value: object, key: str | None
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors by name in what was loaded, checked, and the key that they were under."""
    if not isinstance(value, dict):
        raise InputError(f"{path}: {WANTED}, got {_article(value)}")
    if key is None and not all(isinstance(entry, Tensor) for entry in value.values()):
        wrapped = [name for name in WRAPPERS if isinstance(value.get(name), dict)]
        if len(wrapped) > 1:
            raise InputError(f"{path}: must hold one set of tensors (see --key), got {wrapped}")
        key = wrapped[0] if wrapped else None
    if key is not None:
        if not isinstance(value.get(key), dict):
            found = listed([repr(name) for name in value])
            raise InputError(f"{path}: {key!r} must hold tensors by name, got entries {found}")
        value = value[key]
    problems = [text for name, entry in value.items() if (text := _problem(name, entry, size))]
    if problems or not value:
        what = listed(problems) if problems else "nothing"
        raise InputError(f"{path}: {WANTED}, got {what}")
    total = sum(tensor.nbytes for tensor in value.values())
    if total > MAX_COPIES * size:
        raise InputError(
            f"{path}: {WANTED}, got {total} bytes of tensors that share a file of {size} bytes"
        )
    return {name: tensor.detach() for name, tensor in value.items()}, key


def _problem(name: object, value: object, size: int) -> str | None:
    """What is wrong with an entry; None if it is a plain tensor."""
    if not isinstance(name, str) or not name or name == "__metadata__" or not name.isprintable():
        return f"the name {name!r:.80}"
    found = None
    if type(value) not in (Tensor, nn.Parameter):
        found = _article(value)
    elif value.layout is not torch.strided:
        found = "a sparse tensor"
    elif value.is_quantized or value.is_nested or value.is_conj() or value.is_neg():
        found = "a tensor that is not stored as its values"
    elif value.dtype not in DTYPES.values():
        found = f"a tensor of {value.dtype}"
    elif value.device.type != "cpu" or value.nbytes > min(size, value.untyped_storage().nbytes()):
        found = f"a tensor {list(value.shape)} of more values than the file has"
    return found and f"{name}: {found}"


def _article(value: object) -> str:
    what = f"a mapping of {len(value)}" if isinstance(value, Mapping) else type(value).__name__
    return what if isinstance(value, Mapping) else f"a value of type {what}"
