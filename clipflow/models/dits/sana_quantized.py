"""The fast tier of a SANA transformer: the GEMMs of all blocks in 8 bits.

The embedding of the latents, times, conditions (keys and values too) and the output projection stay
in full precision. Norms hand the quantized operand straight to the GEMM that follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipflow import ops
from clipflow.models.dits.buffers import Buffers
from clipflow.models.dits.linears import (
    QuantizedLinear,
    bytes_of_layers,
    quantized_dtype,
    quantized_nbytes,
)
from clipflow.models.dits.sana_denoiser import SanaDenoiser

if TYPE_CHECKING:
    from clipflow.models.dits.sana import SanaTransformer
    from clipflow.sampling.plan import PlanSpec


class QuantizedSanaDenoiser(SanaDenoiser):
    """`SanaDenoiser` for tier "fast"."""

    linear = staticmethod(QuantizedLinear.shared)

    def __init__(self, dit: SanaTransformer, spec: PlanSpec) -> None:
        super().__init__(dit, spec)
        R, N, D = self.buffers.normed.shape
        self._values = torch.empty(R, N, D, dtype=quantized_dtype(spec.device), device=spec.device)
        self._scales = torch.empty(R, N, device=spec.device)

    def constants(self) -> dict[str, int]:
        held = super().constants()
        held["activations"] += self._values.nbytes + self._scales.nbytes
        return {**held, "8-bit weights": bytes_of_layers(self.blocks)}

    def _first_norm(
        self, hidden: Tensor, shift: Tensor, scale: Tensor, table: Tensor, buffers: Buffers
    ) -> tuple[Tensor, Tensor]:
        R = len(hidden)
        out = (self._values[:R], self._scales[:R])
        return ops.adaln_norm_quant(
            hidden, shift, scale, table=table, eps=self.eps, dtype=self._values.dtype, out=out
        )

    def _norm_after(
        self,
        hidden: Tensor,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        table: Tensor,
        buffers: Buffers,
        *,
        last: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if last:
            return super()._norm_after(hidden, gate, shift, scale, table, buffers, last=True)
        if gate is None:
            hidden.add_(buffers.branch)
        else:
            hidden.addcmul_(gate[:, None], buffers.branch)
        return self._first_norm(hidden, shift, scale, table, buffers)


def operand_bytes(dit: SanaTransformer, spec: PlanSpec) -> int:
    """Of the quantized operands that a plan of the fast tier holds beside `plan_bytes`."""
    return spec.rows * spec.tokens * (dit.config.hidden_size + torch.float32.itemsize)


def quantized_bytes(dit: SanaTransformer, device: torch.device) -> int:
    """Of the 8-bit weights of all blocks, which the plans of one model share, from shapes alone."""
    D = dit.config.hidden_size
    total = 0
    for block in dit.transformer_blocks:
        own, cross, ff = block.attn1, block.attn2, block.ff
        layers = (own.to_out[0], cross.to_q, cross.to_out[0], ff.conv_inverted, ff.conv_point)
        for N, K in [(3 * D, D), *(layer.weight.shape[:2] for layer in layers)]:
            total += quantized_nbytes(N, K, device)
    return total
