"""The SANA diffusion transformer: linear attention, cross-attention and Mix-FFN under adaLN.

Source: Xie et al., "SANA" (2024); parameter names are those of published checkpoints.
"""

# Shape suffixes: B = batch, N = h*w image tokens, L = condition tokens, D = channels.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow import ops
from clipflow.errors import ShapeError
from clipflow.nn.caption_embedding import CaptionProjection
from clipflow.nn.cross_attention import CrossAttention, real_tokens_first
from clipflow.nn.embeddings import AdaLNSingle, grid_position_table
from clipflow.nn.glu_mbconv import GLUMBConv
from clipflow.nn.linear_attention import ReLULinearAttention

if TYPE_CHECKING:
    from clipflow.models.dits.sana_denoiser import SanaDenoiser
    from clipflow.sampling.plan import PlanSpec

CAPTION_NORM_EPS = 1e-5
QK_NORMS = ("none", "rms_norm_across_heads")


@dataclass(frozen=True, kw_only=True)
class SanaConfig:
    """Sizes of the transformer. D = num_attention_heads * attention_head_dim.

    Raises:
        ValueError: `qk_norm` is none of `QK_NORMS`.
    """

    in_channels: int
    out_channels: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    num_cross_attention_heads: int
    cross_attention_head_dim: int
    caption_channels: int
    mlp_ratio: float
    sample_size: int
    norm_eps: float
    # Checkpoints trained with diffusers 0.32 need the table; later versions of diffusers drop it
    # when their config leaves interpolation_scale empty, which ruins the pictures.
    position_table: bool
    interpolation_scale: float
    # SANA-1.5 norms queries and keys; configurations written before it was known have no such key.
    qk_norm: str = "none"

    def __post_init__(self) -> None:
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"dit.qk_norm must be one of {list(QK_NORMS)}, got {self.qk_norm!r}")

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class SanaBlock(nn.Module):
    """h += g1 LinAttn(adaLN(h)); h += CrossAttn(h); h += g2 FFN(adaLN(h)).

    The last sum is left to the caller, who fuses it with the norm that follows.
    """

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)
        normed = config.qk_norm != "none"
        self.attn1 = ReLULinearAttention(
            D, config.num_attention_heads, config.attention_head_dim, qk_norm=normed
        )
        self.attn2 = CrossAttention(
            D, config.num_cross_attention_heads, config.cross_attention_head_dim, qk_norm=normed
        )
        self.ff = GLUMBConv(D, config.mlp_ratio)

    def forward(
        self,
        hidden: Tensor,
        normed: Tensor,
        modulation: Tensor,
        condition: Tensor,
        key_lengths: Tensor | None,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Everything up to the gate of the feed-forward branch.

        Args:
            hidden: the residual stream, [B, N, D].
            normed: its first modulated norm, [B, N, D].
            modulation: of this time, [B, 6, D], without the block's table.
            condition: [B, L, D]; of sample b the first key_lengths[b] tokens are real, or all.
            grid: (h, w) with h * w = N.

        Returns:
            (the residual stream, the feed-forward branch), both [B, N, D].
        """
        gate = self.scale_shift_table[2] + modulation[:, 2]
        hidden = torch.addcmul(hidden, gate[:, None], self.attn1(normed))
        hidden, normed = ops.gated_residual_norm(
            hidden,
            self.attn2(hidden, condition, key_lengths),
            None,
            modulation[:, 3],
            modulation[:, 4],
            table=self.scale_shift_table[3:5],
            eps=self.eps,
        )
        return hidden, self.ff(normed, grid)


class SanaTransformer(nn.Module):
    """Predicts the flow-matching velocity of a latent grid under a condition."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(config.in_channels, D, 1)})
        self.time_embed = AdaLNSingle(D)
        self.caption_projection = CaptionProjection(config.caption_channels, D)
        self.caption_norm = nn.RMSNorm(D, eps=CAPTION_NORM_EPS)
        self.transformer_blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) / D**0.5)
        self.proj_out = nn.Linear(D, config.out_channels)

    def forward(
        self, latents: Tensor, timestep: Tensor, condition: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Velocity (noise minus data) at one time for each sample.

        Args:
            latents: [B, in_channels, h, w].
            timestep: [B], 0..1000 (1000 times the noise level); UniLIP's are integers.
            condition: [B, L, caption_channels], output of the connector's projector.
            mask: [B, L], nonzero where a condition token is real; None when all are.

        Returns:
            [B, out_channels, h, w], dtype of `latents`.

        Raises:
            ShapeError: `latents` does not have the configured number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.in_channels:
            wanted = f"[B, {self.config.in_channels}, h, w]"
            raise ShapeError(f"sana: latents must be {wanted}, got {list(latents.shape)}")
        grid = (latents.shape[2], latents.shape[3])
        hidden = self.embed_latents(latents)
        condition, key_lengths = self.embed_condition(condition), None
        if mask is not None:
            condition, key_lengths = real_tokens_first(condition, mask.bool())
        modulation, embedding = self.time_embed(timestep)
        shift, scale, gate = modulation[:, 0], modulation[:, 1], modulation[:, 5]
        # What modulates the norm after each block: the next block's, at last the output's.
        after = [(shift, scale, block.scale_shift_table[:2]) for block in self.transformer_blocks]
        after.append((embedding, embedding, self.scale_shift_table))
        eps = self.config.norm_eps
        normed = ops.adaln_norm(hidden, *after[0][:2], table=after[0][2], eps=eps)
        for block, (shift, scale, table) in zip(self.transformer_blocks, after[1:], strict=True):
            hidden, branch = block(hidden, normed, modulation, condition, key_lengths, grid)
            hidden, normed = ops.gated_residual_norm(
                hidden, branch, gate, shift, scale,
                gate_table=block.scale_shift_table[5], table=table, eps=eps,
            )  # fmt: skip
        return self.proj_out(normed).transpose(1, 2).unflatten(2, grid)

    @torch.no_grad()
    def denoiser(self, spec: PlanSpec) -> SanaDenoiser:
        """The transformer prepared for a sampling plan; see `clipflow.sampling.PlanCache`."""
        from clipflow.models.dits.linears import can_quantize
        from clipflow.models.dits.sana_denoiser import SanaDenoiser
        from clipflow.models.dits.sana_quantized import QuantizedSanaDenoiser

        quantized = spec.tier == "fast" and can_quantize(spec.device)
        return (QuantizedSanaDenoiser if quantized else SanaDenoiser)(self, spec)

    def plan_bytes(self, spec: PlanSpec) -> int:
        """Bytes that `denoiser` allocates, less what is made of the weights, 8-bit ones too."""
        from clipflow.models.dits.sana_denoiser import plan_bytes
        from clipflow.models.dits.sana_quantized import operand_bytes

        operands = operand_bytes(self, spec) if spec.tier == "fast" else 0
        return plan_bytes(self, spec) + operands

    def quantized_bytes(self, device: torch.device) -> int:
        """Bytes of the 8-bit weights that all plans of the fast tier on `device` share."""
        from clipflow.models.dits.sana_quantized import quantized_bytes

        return quantized_bytes(self, device)

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Tokens [B, h*w, D] of `latents` [B, in_channels, h, w], position table included."""
        projection = self.patch_embed["proj"]
        tokens = latents.flatten(2).transpose(1, 2)
        tokens = F.linear(tokens, projection.weight.flatten(1), projection.bias)
        if not self.config.position_table:
            return tokens
        return tokens + self.position_table(latents.shape[2], latents.shape[3]).to(tokens)

    def embed_condition(self, condition: Tensor) -> Tensor:
        """Cross-attention tokens [B, L, D] of `condition` [B, L, caption_channels]."""
        return self.caption_norm(self.caption_projection(condition))

    def position_table(self, height: int, width: int) -> Tensor:
        """The fixed table, float32 [height * width, D]."""
        config = self.config
        return grid_position_table(
            height,
            width,
            config.hidden_size,
            base_size=config.sample_size,
            scale=config.interpolation_scale,
        )
