"""Weights of the recorded tiny models: drawn again as they were drawn, instead of being stored.

PyTorch's generator on the CPU gives the same numbers in all its versions; with other instructions
than AVX2 or AVX-512 the last bit of some differs, far below what the tests allow.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Shape = tuple[int, ...]
# (name, shape) -> mean and standard deviation
Spread = Callable[[str, Shape], tuple[float, float]]


def drawn(shapes: Mapping[str, Shape], seed: int, spread: Spread) -> dict[str, Tensor]:
    """Normal weights for names, in the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in sorted(shapes):
        mean, deviation = spread(name, shapes[name])
        state[name] = torch.randn(shapes[name], generator=generator) * deviation + mean
    return state


def fan_in(shape: Shape) -> int:
    """Weights that one output of a matrix or a convolution sums."""
    return math.prod(shape[1:])
