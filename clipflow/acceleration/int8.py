"""Linear layers and 1x1 convolutions in int8: the fast tier, on the CPU."""

# Shape suffixes: B = batch, N = h*w tokens, K = input channels.

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow import ops
from clipflow.acceleration import checks
from clipflow.acceleration.replace import Replacement
from clipflow.sampling.weights import WeightsWatch


class Int8:
    """The quantized weight of one layer, beside the layer's own.

    Attributes:
        weight: the quantized weight.
        source: the layer's weight that it was made of.
    """

    def __init__(self, source: nn.Parameter) -> None:
        self.weight = ops.quantize_weight(source.detach().flatten(1))
        self.source = source
        self._watch()

    def _watch(self) -> None:
        source = self.source
        self._weights = WeightsWatch(lambda: (source,))
        self._state = self._weights.state()

    def is_fresh(self) -> bool:
        """Whether the source is as it was when it was quantized."""
        return self._weights.state() is self._state

    def __getstate__(self) -> dict[str, object]:
        return {"weight": self.weight, "source": self.source, "fresh": self.is_fresh()}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.weight, self.source = state["weight"], state["source"]
        self._watch()
        if not state["fresh"]:
            self._state = None

    def product(self, layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
        """The layer applied to `x` [..., K]; in float where int8 would not do.

        That is: on another device, where a gradient is needed, in autocast, and once the weight was
        written or moved, by a cast for example.
        """
        source, bias = layer.weight, layer.bias
        if (
            source is self.source
            and (torch.compiler.is_compiling() or self.is_fresh())
            and x.device == self.weight.scales.device
            and not torch.is_autocast_enabled(x.device.type)
            and not (torch.is_grad_enabled() and (x.requires_grad or source.requires_grad))
        ):
            return ops.quantized_linear(x, self.weight, bias)
        return F.linear(x, source.flatten(1), bias)


def linear(self: nn.Linear, input: Tensor, *, int8: Int8) -> Tensor:
    """The forward of a `Linear`."""
    return int8.product(self, input)


def convolution(self: nn.Conv2d, input: Tensor, *, int8: Int8) -> Tensor:
    """The forward of a `Conv2d` with 1x1 kernels, [B, K, h, w]."""
    return int8.product(self, input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether `pointwise` may be called on `conv`, which has 1x1 kernels."""
    return checks.plain(nn.Conv2d, conv) or checks.carries(conv, convolution)


def pointwise(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    """`conv` on `tokens` [B, N, K], in int8 if it is accelerated so."""
    if (own := conv.__dict__.get("forward")) is None:
        return F.linear(tokens, conv.weight.flatten(1), conv.bias)
    return own.keywords["int8"].product(conv, tokens)


def replacements(module: nn.Module, names: Iterable[str]) -> Iterator[Replacement]:
    """The layers called `names` in int8; raises AccelerationError off the CPU."""
    for name in names:
        layer = module.get_submodule(name)
        if not layer.weight.is_cpu:
            raise checks.refuse(name, f"on {layer.weight.device}", "the CPU for tier 'fast'")
        forward = convolution if isinstance(layer, nn.Conv2d) else linear
        by = partial(forward, int8=Int8(layer.weight))
        yield Replacement(name=name, module=layer, by=by, ops="quantized_linear, int8")
