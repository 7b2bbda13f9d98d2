"""Linear layers of a plan: weights prepared once, results into buffers."""

# Shape suffixes: T = tokens, K = input channels, N = output channels.

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from clipflow import ops
from clipflow.sampling.weights import version_of

# Tokens in full precision, or (values, scales) as `adaln_norm_quant` makes them.
Operand = Tensor | tuple[Tensor, Tensor]


class LinearLike(Protocol):
    """A linear layer with fixed weights; [N, K, ...] of a 1x1 convolution are [N, K]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None: ...

    def __call__(self, x: Operand, out: Tensor) -> Tensor:
        """Write the layer's values at `x`, [T, K], to `out`, [T, N]."""


class Linear:
    """x W^T + b in the dtype of the weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.detach().flatten(1).t()
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight, out=out)
        return torch.addmm(self.bias, x, self.weight, out=out)


class QuantizedLinear:
    """The same in 8 bits: int8 on the CPU, fp8 on a GPU; the weight is quantized per channel.

    Plans of one model share the quantized weights: see `shared`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.source = weight.detach().flatten(1)  # kept, so that its address stays its own
        self.weight = ops.quantize_weight(self.source, quantized_dtype(weight.device))
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Operand, out: Tensor) -> Tensor:
        values, scales = x if isinstance(x, tuple) else (x, None)
        return ops.quantized_linear(
            values, self.weight, self.bias, x_scales=scales, dtype=out.dtype, out=out
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weight."""
        return self.weight.values.nbytes + self.weight.scales.nbytes

    @classmethod
    def shared(cls, weight: Tensor, bias: Tensor | None) -> QuantizedLinear:
        """The layer that another plan made of the same weight, or a new one."""
        place = (weight.data_ptr(), weight.shape, weight.dtype, weight.device)
        key = (*place, version_of(weight))
        found = _quantized.get(key)
        if found is None:
            found = _quantized[key] = cls(weight, bias)
        return found


_quantized: WeakValueDictionary[tuple[object, ...], QuantizedLinear] = WeakValueDictionary()


def bytes_of_layers(blocks: Iterable[object]) -> int:
    """Of the quantized weights that `blocks` have as attributes, each counted once."""
    layers = {
        id(layer): layer
        for block in blocks
        for layer in vars(block).values()
        if isinstance(layer, QuantizedLinear)
    }
    return sum(layer.nbytes for layer in layers.values())


def quantized_nbytes(N: int, K: int, device: torch.device) -> int:
    """Of a quantized weight [N, K], from its shape alone."""
    # On the CPU in tiles of 16 x 16; a float32 scale for each output channel.
    values = -(-N // 16) * -(-K // 16) * 256 if device.type == "cpu" else N * K
    return values + N * torch.float32.itemsize


def quantized_dtype(device: torch.device) -> torch.dtype:
    """What the fast tier multiplies in on `device`."""
    return torch.float8_e4m3fn if device.type == "cuda" else torch.int8


def can_quantize(device: torch.device) -> bool:
    """Whether 8 bits are faster there: on CPUs, and on GPUs with fp8 matrix units (sm_89 on)."""
    return device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def tokens_of(x: Operand) -> Operand:
    """[R, N, D] as the rows of a matrix."""
    return tuple(part.flatten(0, 1) for part in x) if isinstance(x, tuple) else x.flatten(0, 1)
