"""The DiT of BLIP3-o as its reference runs it: one plain PyTorch op after the other.

What that does more often than it needs to is kept: each call takes its corner of a rotary table of
384 x 384 places (moved to the device first), expands masks that hide nothing to dense ones, rotates
through complex numbers, and projects the condition, its keys and its values again.
"""

# Shape suffixes: B = rows, N = image tokens, S = keys, H = heads, K = head width.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.models.dits.lumina import LuminaBlock, LuminaTransformer
from clipflow.nn.joint_norm_attention import JointNormAttention

TABLE_SIDE = 384


class ReferenceLumina:
    """Calls the weights of `dit`, whatever their dtype; float64 stays float64 throughout."""

    def __init__(self, dit: LuminaTransformer) -> None:
        self.dit, self.config = dit, dit.config
        self.dtype = dit.norm_out["linear_2"].weight.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.table = self._table()  # on the CPU wherever the model is

    def __call__(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Velocity [B, C, h, w] of latents of patch size 1."""
        dit, (h, w) = self.dit, latents.shape[2:]
        hidden = dit.patch_embedder["proj"](latents.flatten(2).transpose(1, 2))
        caption = dit.caption_projection(condition)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        caption_mask = torch.ones(caption.shape[:2], device=hidden.device)
        embedding = self._embedding(timestep, caption, caption_mask)
        rope = self.table.to(latents.device)[:h, :w].flatten(0, 1)
        for block in dit.layers:
            masks = (mask, caption_mask.bool())
            hidden = self._block(block, hidden, caption, masks, embedding, rope)
        scale = dit.norm_out["linear_1"](F.silu(embedding))
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale)[:, None]
        return dit.norm_out["linear_2"](hidden).transpose(1, 2).unflatten(2, (h, w))

    def _table(self) -> Tensor:
        """Rotations by row and column in turn, complex [384, 384, K / 2]."""
        pairs = self.config.head_dim // 4
        frequency = self.config.rope_theta ** (-torch.arange(pairs, dtype=self.wide) / pairs)
        angle = torch.arange(TABLE_SIDE, dtype=self.wide)[:, None] * frequency
        rows = angle[:, None].expand(-1, TABLE_SIDE, -1)
        angles = torch.stack([rows, rows.transpose(0, 1)], dim=-1).flatten(2)
        return torch.polar(torch.ones_like(angles), angles)

    def _embedding(self, timestep: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        embed = self.dit.time_caption_embed
        frequency = torch.exp(torch.arange(128, device=caption.device) * -math.log(10000.0) / 128)
        angle = timestep.float()[:, None] * frequency
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.dtype)
        steps = embed.timestep_embedder
        time = steps.linear_2(F.silu(steps.linear_1(waves)))
        weights = mask.to(self.wide)[..., None]
        mean = (caption * weights).sum(dim=1) / weights.sum(dim=1)
        return time + embed.caption_embedder(mean.to(self.dtype))

    def _block(
        self,
        block: LuminaBlock,
        hidden: Tensor,
        caption: Tensor,
        masks: tuple[Tensor, Tensor],
        embedding: Tensor,
        rope: Tensor,
    ) -> Tensor:
        rows = block.norm1.linear(F.silu(embedding))[:, None]
        scale, gate, last_scale, last_gate = rows.chunk(4, dim=-1)
        normed = self._rms(block.norm1.norm, hidden) * (1 + scale)
        own = self._attend(block.attn1, normed, normed, masks[0], rope, rope)
        context = self._rms(block.norm1_context, caption)
        other = self._attend(block.attn2, normed, context, masks[1], rope, None)
        mixed = own + other * block.gate.tanh().view(1, 1, -1, 1)
        branch = block.attn2.to_out[0](mixed.flatten(2))
        hidden = hidden + gate.tanh() * self._rms(block.norm2, branch)
        normed = self._rms(block.ffn_norm1, hidden) * (1 + last_scale)
        feed = block.feed_forward
        gated = F.silu(feed.linear_1(normed).to(self.wide)).to(self.dtype)
        branch = feed.linear_2(gated * feed.linear_3(normed))
        return hidden + last_gate.tanh() * self._rms(block.ffn_norm2, branch)

    def _rms(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        wide = x.to(self.wide)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        return wide.to(self.dtype) * norm.weight

    def _attend(
        self,
        part: JointNormAttention,
        tokens: Tensor,
        source: Tensor,
        mask: Tensor,
        q_rope: Tensor | None,
        k_rope: Tensor | None,
    ) -> Tensor:
        """[B, N, H, K] of `tokens` [B, N, D] and `source` [B, S, D] with `mask` [B, S]."""
        H, G = part.heads, part.key_heads
        q = part.norm_q(part.to_q(tokens)).unflatten(-1, (H, -1))
        k = part.norm_k(part.to_k(source)).unflatten(-1, (G, -1))
        v = part.to_v(source).unflatten(-1, (G, -1))
        q, k = self._rotated(q, q_rope), self._rotated(k, k_rope)
        k, v = (t.repeat_interleave(H // G, dim=2) for t in (k, v))
        seen = mask[:, None, None, :].expand(-1, H, tokens.shape[1], -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)

    def _rotated(self, x: Tensor, rope: Tensor | None) -> Tensor:
        if rope is None:
            return x
        pairs = torch.view_as_complex(x.to(self.wide).unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * rope[None, :, None])
        return turned.flatten(3).to(x.dtype)
