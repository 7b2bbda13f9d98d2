"""The bidirectional connector between the language model and the diffusion transformer."""

# Shape suffixes: B = batch, L = positions, H = width, G = heads of keys, K = width of a head.

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from clipflow.ops import adaln_norm, dit_attention, qk_norm_rope, swiglu


class Connector(nn.Module):
    """Qwen2 layers without the causal mask, then RMSNorm (specs: UniLIP, dual condition).

    Parameters have the names of Qwen2's own layers.

    Args:
        config: the language model's configuration; the layers have its sizes.
        num_layers: how many.
    """

    def __init__(self, config: Qwen2Config, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConnectorLayer(config) for _ in range(num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        rope = self._rope(hidden.shape[1])
        if mask is None:
            return self._layers(hidden, rope, None)
        # Real positions to the front, in their order, which is also what counts their angles.
        real = mask.bool()
        order = real.int().argsort(dim=-1, descending=True, stable=True)
        place = (real.cumsum(-1) - 1).clamp(min=0)
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        return self._layers(hidden[rows, order], rope, real.sum(-1))[rows, place]

    def _layers(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], key_lengths: Tensor | None
    ) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, rope, key_lengths)
        return self.norm(hidden)

    def _rope(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) [length, K / 2], of angles in float32 as the language model's are."""
        frequency = self.rotary_emb.inv_freq.float()
        angle = torch.arange(length, device=frequency.device)[:, None] * frequency
        return angle.cos(), angle.sin()


class ConnectorLayer(nn.Module):
    """Attention among all real positions and a SwiGLU, each after an RMSNorm and added."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = ConnectorAttention(config)
        self.mlp = ConnectorMLP(H, config.intermediate_size)
        self.input_layernorm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)

    def forward(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], key_lengths: Tensor | None
    ) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, key_lengths)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class ConnectorAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        H, heads = config.hidden_size, config.num_attention_heads
        self.head_dim = H // heads
        inner, grouped = heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(H, inner)
        self.k_proj = nn.Linear(H, grouped)
        self.v_proj = nn.Linear(H, grouped)
        self.o_proj = nn.Linear(inner, H, bias=False)

    def forward(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], key_lengths: Tensor | None
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden).unflatten(-1, (-1, self.head_dim)) for p in projections)
        q, k = qk_norm_rope(q, k, q_rope=rope, k_rope=rope, norm="none")
        return self.o_proj(dit_attention(q, k, v, key_lengths=key_lengths).flatten(2))


class ConnectorMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(hidden), self.up_proj(hidden)))


class RMSNorm(nn.Module):
    """Unit mean square over the width, times a weight; one rounding."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        unscaled = hidden.new_zeros(hidden.shape[0], hidden.shape[-1])
        return adaln_norm(hidden, None, unscaled, weight=self.weight, norm="rms", eps=self.eps)
