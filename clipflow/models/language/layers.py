"""Layers of Qwen2, Qwen2.5-VL and Qwen3 through the fused ops, whatever they attend to.

The modules, and so the parameters and their names, stay transformers' own; only how they are run is
here. `attend` is what differs between a prompt, one more token, and UniLIP's connector.

Source: Yang et al., "Qwen2 Technical Report" (2024), section 2.2; Yang et al., "Qwen3 Technical
Report" (2025), section 2: queries and keys are normed head by head, projections have no bias.
"""

# Shape suffixes: B = batch, L = positions, H = width, A = heads, G = heads of keys, K = width of a
# head.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipflow.ops import adaln_norm, qk_norm_rope, swiglu

Rope = tuple[Tensor, Tensor]
# (q [B, L, A, K], k [B, L, G, K], v [B, L, G, K]) -> [B, L, A, K]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_layer(layer: nn.Module, hidden: Tensor, rope: Rope, attend: Attend) -> Tensor:
    """One layer on `hidden` [B, L, H]; same shape out.

    Args:
        layer: whose parameters to use: a decoder layer of Qwen2, Qwen2.5-VL or Qwen3.
        hidden: the residual stream.
        rope: (cos, sin) of the positions, float32 [L, K/2] each, or [B, L, K/2] where rows differ.
        attend: mixes the positions.
    """
    attention, mlp = layer.self_attn, layer.mlp
    normed = rms_norm(hidden, layer.input_layernorm)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (p(normed).unflatten(-1, (-1, attention.head_dim)) for p in projections)
    if rope[0].ndim == 3:  # all positions of all rows as those of one
        B, rope = len(q), tuple(part.flatten(0, 1) for part in rope)
        q, k = _norm_and_turn(attention, q.flatten(0, 1)[None], k.flatten(0, 1)[None], rope)
        q, k = (t[0].unflatten(0, (B, -1)) for t in (q, k))
    else:
        q, k = _norm_and_turn(attention, q, k, rope)
    hidden = hidden + attention.o_proj(attend(q, k, v).flatten(2))
    normed = rms_norm(hidden, layer.post_attention_layernorm)
    return hidden + mlp.down_proj(swiglu(mlp.gate_proj(normed), mlp.up_proj(normed)))


def rms_norm(hidden: Tensor, norm: nn.Module) -> Tensor:
    """`hidden` [B, L, H] through an RMSNorm of transformers, rounded once."""
    unscaled = hidden.new_zeros(hidden.shape[0], hidden.shape[-1])
    return adaln_norm(
        hidden, None, unscaled, weight=norm.weight, norm="rms", eps=norm.variance_epsilon
    )


def rope_table(rotary: nn.Module, positions: Tensor) -> Rope:
    """(cos, sin) of the shape of `positions` and K/2; the angles are float32, as transformers'.

    Args:
        rotary: a language model's `rotary_emb`.
        positions: [L] or [B, L]; or multimodal ones, [3, B, L] of time, row and column, of which
            each turns the pairs of a head that `rotary` gives it.
    """
    angle = positions[..., None].float() * rotary.inv_freq.float()
    if positions.ndim == 3:
        sections = angle.split(rotary.mrope_section, dim=-1)
        angle = torch.cat([part[i % 3] for i, part in enumerate(sections)], dim=-1)
    return angle.cos(), angle.sin()


def _norm_and_turn(attention: nn.Module, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Queries and keys, normed where the layer has norms for them, turned by their positions."""
    q_norm = getattr(attention, "q_norm", None)
    if q_norm is None:
        return qk_norm_rope(q, k, q_rope=rope, k_rope=rope, norm="none")
    return qk_norm_rope(
        q, k, q_norm.weight, attention.k_norm.weight,
        q_rope=rope, k_rope=rope, norm="rms", eps=q_norm.variance_epsilon,
    )  # fmt: skip
