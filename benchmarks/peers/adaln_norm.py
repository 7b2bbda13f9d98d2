"""GPU libraries that normalize rows; they leave the modulation to PyTorch, which is timed too."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor


def peers(inputs: tuple[Tensor, ...], options: dict[str, object]) -> dict[str, Callable]:
    """Layer norms of the installed libraries, each followed by `x * (1 + scale) + shift`."""
    x, shift, scale = inputs[:3]
    if not x.is_cuda or x.ndim != 3 or shift.ndim != 2 or options.get("norm", "layer") != "layer":
        return {}
    channels, eps = x.shape[-1], options.get("eps", 1e-6)
    found: dict[str, Callable] = {}

    def add(name: str, normalize: Callable[[Tensor], Tensor]) -> None:
        found[name] = lambda: normalize(x) * (1 + scale[:, None]) + shift[:, None]

    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers.functional import liger_layer_norm

        one, zero = torch.ones_like(scale[0]), torch.zeros_like(scale[0])
        add("Liger", lambda t: liger_layer_norm(t, one, zero, eps))
    if find_spec("apex") is not None:
        from apex.normalization.fused_layer_norm import fused_layer_norm

        add("apex", lambda t: fused_layer_norm(t, (channels,), eps))
    return found
