"""Random weights that a deep model survives.

One block of 4 million normal numbers is drawn for a seed; every tensor reads it from an own place
on, around its end, scaled. Tensors of a folder are thus not independent of each other, which no
test here needs, and billions of numbers cost no more than the disk does. The block's length is
prime, so that the rows of a matrix never repeat.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

BLOCK = 4_194_301
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weights called `name`: block after block, from a place of its own on."""
        mean, std = scale_of(name, shape)
        start, count = zlib.crc32(f"{self.seed} {name}".encode()) % BLOCK, math.prod(shape)
        result = torch.empty(count, dtype=dtype)
        for begin in range(-start, count, BLOCK):
            first, last = max(begin, 0), min(begin + BLOCK, count)
            result[first:last] = self._block[first - begin : last - begin] * std + mean
        return result.view(shape)


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
