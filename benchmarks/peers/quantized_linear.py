"""Competitors of a linear layer in 8 bits on the CPU: float products, and int8 of PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def peers(
    inputs: tuple[Tensor, ...], options: dict[str, object]
) -> dict[str, Callable[[], object]]:
    """The float layer, dynamic quantization of PyTorch, and the bare product of oneDNN.

    "onednn u8s8" gets its activations already quantized, with one scale for all of them. Without
    VNNI, oneDNN's and FBGEMM's products may saturate, so that their results are not comparable.
    """
    (x,), weight = inputs, options["weight"]
    N, K = weight.shape
    matrix = weight.dequantized(x.dtype)
    bias = options.get("bias")
    bias = None if bias is None else bias.to(x.dtype)
    found = {f"{str(x.dtype).removeprefix('torch.')} linear": lambda: F.linear(x, matrix, bias)}
    if not x.is_cpu or x.dtype != torch.float32 or weight.dtype != torch.int8:
        return found

    layer = torch.nn.Linear(K, N, bias=bias is not None)
    layer.weight.copy_(matrix)
    if bias is not None:
        layer.bias.copy_(bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still the fastest that PyTorch has
        dynamic = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8
        )
    found["torch dynamic int8"] = lambda: dynamic(x)

    if torch.backends.mkldnn.is_available():
        rows = x.reshape(-1, K)
        activations = (rows / rows.abs().amax() * 127 + 128).round().to(torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack(weight.rows().contiguous(), list(rows.shape))
        zeros = torch.zeros(N, dtype=torch.int32)
        rest = (weight.scales, zeros, bias, 1.0, 0, torch.float32, "none", [], "")
        product = torch.ops.onednn.qlinear_pointwise
        found["onednn u8s8"] = lambda: product(activations, 0.01, 128, packed, *rest)
    return found
