"""The fast tier of a Lumina transformer: the GEMMs of all blocks in 8 bits.

The ends, times, conditions (keys, values and modulations too) stay in full precision. At the 64
tokens of published models, quantizing an operand by itself costs too little for ops of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clipflow.models.dits.linears import QuantizedLinear, quantized_nbytes
from clipflow.models.dits.lumina_denoiser import LuminaDenoiser

if TYPE_CHECKING:
    from clipflow.models.dits.lumina import LuminaTransformer


class QuantizedLuminaDenoiser(LuminaDenoiser):
    """`LuminaDenoiser` for tier "fast"."""

    linear = staticmethod(QuantizedLinear.shared)


def quantized_bytes(dit: LuminaTransformer, device: torch.device) -> int:
    """Of the 8-bit weights of all blocks, which the plans of one model share, from shapes alone."""
    config = dit.config
    D, M, G = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    layers = [(2 * D + 2 * G, D), (D, D), (2 * M, D), (D, M)]
    return len(dit.layers) * sum(quantized_nbytes(N, K, device) for N, K in layers)
