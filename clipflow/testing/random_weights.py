"""Random weights that a deep model survives, and safetensors files written tensor by tensor.

One block of 4 million normal numbers is drawn for a seed; every tensor reads it from an own place
on, around its end, scaled. Tensors of a folder are thus not independent of each other, which no
test here needs, and billions of numbers cost no more than the disk does. The block's length is
prime, so that the rows of a matrix never repeat.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 4_194_301
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Ending of a name -> (mean, standard deviation); the first that fits counts.
SCALES = (
    (("ls1", "ls2"), (0.1, 0.02)),
    (("class_embedding", "position_embedding"), (0.0, 0.02)),
    (("bias",), (0.0, 0.02)),
)
NORM = (1.0, 0.05)


class RandomWeights:
    """Weights for names and shapes; the same for the same seed, whatever else is written.

    Weights have a variance of 1 / fan-in, norms are about 1, layer scales about 0.1 and biases
    small, so that activations keep their size through all layers.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(BLOCK, generator=generator)

    def write(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        take: Callable[[memoryview], object],
    ) -> None:
        """Hand the bytes of one tensor to `take`, at most one block at a time."""
        mean, std = scale_of(name, shape)
        start = zlib.crc32(f"{self.seed} {name}".encode()) % BLOCK
        left = math.prod(shape)
        if left <= BLOCK - start:
            take(_bytes(self._scaled(slice(start, start + left), mean, std, dtype)))
            return
        block = _bytes(self._scaled(slice(None), mean, std, dtype))
        begin = start * dtype.itemsize
        left *= dtype.itemsize
        while left:
            piece = block[begin : begin + left]
            take(piece)
            left -= len(piece)
            begin = 0

    def _scaled(self, where: slice, mean: float, std: float, dtype: torch.dtype) -> Tensor:
        return (self._block[where] * std + mean).to(dtype)


def scale_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's weights."""
    for endings, scale in SCALES:
        if name.endswith(endings):
            return scale
    if len(shape) == 1:
        return NORM
    if name.endswith(("scale_shift_table", "latent_queries")):
        return 0.0, shape[-1] ** -0.5
    return 0.0, math.prod(shape[1:]) ** -0.5


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    write: Callable[[str, Callable[[memoryview], object]], object],
) -> None:
    """Write a safetensors file without holding more than a part of one tensor in memory.

    The bytes are those that `safetensors.torch.save_file` writes for the same tensors.

    Args:
        path: of the new file.
        tensors: name -> (shape, dtype).
        write: called as (name, take); hands the bytes of that tensor to `take`.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = tensors[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            write(name, file.write)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())
