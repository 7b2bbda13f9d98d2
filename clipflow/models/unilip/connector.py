"""The bidirectional connector between the language model and the diffusion transformer."""

# Shape suffixes: B = batch, L = positions, H = width.

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from clipflow.models.language.layers import rms_norm, rope_table, run_layer
from clipflow.ops import dit_attention


class Connector(nn.Module):
    """Qwen2 layers without the causal mask, then RMSNorm (specs: UniLIP, dual condition).

    Args:
        config: the language model's configuration; the layers have its sizes.
        num_layers: how many.
    """

    def __init__(self, config: Qwen2Config, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, i) for i in range(num_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix `hidden` [B, L, H] among the real positions of each sample.

        Args:
            hidden: [B, L, H]; finite where padded, too.
            mask: [B, L], nonzero where a position is real, wherever the padding is; None where all
                are real.

        Returns:
            [B, L, H]; what is at the padded positions means nothing.
        """
        if mask is None:
            return self._mixed(hidden, None)
        # Real positions to the front, in their order, which is also what counts their angles.
        real = mask.bool()
        order = real.int().argsort(dim=-1, descending=True, stable=True)
        place = (real.cumsum(-1) - 1).clamp(min=0)
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        return self._mixed(hidden[rows, order], real.sum(-1))[rows, place]

    def _mixed(self, hidden: Tensor, key_lengths: Tensor | None) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        rope = rope_table(self.rotary_emb, positions)
        attend = partial(dit_attention, key_lengths=key_lengths)
        for layer in self.layers:
            hidden = run_layer(layer, hidden, rope, attend)
        return rms_norm(hidden, self.norm)
