"""Safetensors files, which the library maps into memory and checks against their size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# A mapped file is opened anew after so much of it was read, so that its pages leave the process.
MAPPED_BYTES = 1 << 27
LONGEST_NAME = 300
LONGEST_REASON = 300
LARGEST = 2**60
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Read = Callable[[str], Tensor]


class PassingReader:
    """Reads tensors that are not kept: the file is opened anew after `most` bytes of them.

    Args:
        open_file: opens the file; gives what reads a tensor by name.
        most: bytes.
    """

    def __init__(self, open_file: Callable[[], Read], most: float) -> None:
        self._open, self._most = open_file, most
        self.close()

    def __call__(self, name: str) -> Tensor:
        if self._bytes > self._most:
            self.close()
        self._read = self._read or self._open()
        tensor = self._read(name)
        self._bytes += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Let the file go; it is opened again when it must be."""
        self._read: Read | None = None
        self._bytes = 0


class SafetensorsFile:
    """One file, opened; of it only the header is read.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> dtype, or the format's word for one that is none of `DTYPES`.
        mapped: reads a tensor without a copy. Its memory is private: who writes to it changes
            neither the file nor another model.
        passing: reads a tensor that is not kept.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no whole safetensors file, or has a name that cannot be printed or a
            shape beyond any memory.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"load: {path} must be there, got no such file")
        if not path.is_file():  # a pipe would wait for ever
            raise ValueError(f"load: {path} must be a file, got a folder or a device")
        file = _open(path)
        names = list(file.keys())
        for name in names:
            if not name.isprintable() or len(name) > LONGEST_NAME:
                raise ValueError(
                    f"load: {path}: a tensor's name must be printable text, got {name[:40]!r}"
                )
        slices = {name: file.get_slice(name) for name in names}
        self.shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
        for name, shape in self.shapes.items():
            if math.prod(max(size, 1) for size in shape) > LARGEST:  # empty, but not to kernels
                raise ValueError(
                    f"load: {path}: {name[:40]} must have a shape that fits into memory, got "
                    f"{shape!s:.80}"
                )
        kinds = {name: found.get_dtype() for name, found in slices.items()}
        self.dtypes = {name: DTYPES.get(kind, kind) for name, kind in kinds.items()}
        self.mapped = _reader(file)
        self.passing = PassingReader(lambda: _reader(_open(path)), MAPPED_BYTES)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the library is no Exception
        reason = repr(str(error))[1:-1][:LONGEST_REASON]
        raise ValueError(
            f"load: {path} must be a whole safetensors file, got {path.stat().st_size} bytes: "
            + reason
        ) from error


def _reader(file: safe_open) -> Read:
    def read(name: str) -> Tensor:
        tensor = file.get_tensor(name)
        # Odd bytes before it: kernels want whole numbers.
        return tensor.clone() if tensor.data_ptr() % tensor.dtype.itemsize else tensor

    return read
