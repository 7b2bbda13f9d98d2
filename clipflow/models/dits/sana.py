"""The SANA diffusion transformer: linear attention, cross-attention and Mix-FFN under adaLN.

Source: Xie et al., "SANA" (2024); parameter names are those of published checkpoints.
"""

# Shape suffixes: B = batch, N = h*w image tokens, L = condition tokens, D = channels.

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow import ops
from clipflow.errors import ShapeError
from clipflow.nn.cross_attention import CrossAttention
from clipflow.nn.embeddings import AdaLNSingle, grid_position_table
from clipflow.nn.glu_mbconv import GLUMBConv
from clipflow.nn.linear_attention import ReLULinearAttention

CAPTION_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class SanaConfig:
    """Sizes of the transformer. D = num_attention_heads * attention_head_dim."""

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

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class CaptionProjection(nn.Module):
    """Linear - GELU(tanh) - Linear on the condition tokens."""

    def __init__(self, in_features: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(caption), approximate="tanh"))


class SanaBlock(nn.Module):
    """h += g1 LinAttn(adaLN(h)); h += CrossAttn(h); h += g2 FFN(adaLN(h))."""

    def __init__(self, config: SanaConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.attn1 = ReLULinearAttention(D, config.num_attention_heads, config.attention_head_dim)
        self.attn2 = CrossAttention(
            D, config.num_cross_attention_heads, config.cross_attention_head_dim
        )
        self.ff = GLUMBConv(D, config.mlp_ratio)

    def forward(
        self,
        hidden: Tensor,
        modulation: Tensor,
        condition: Tensor,
        mask: Tensor | None,
        grid: tuple[int, int],
    ) -> Tensor:
        """Transform `hidden` [B, N, D] under `modulation` [B, 6, D] and `condition` [B, L, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).unbind(
            1
        )
        normed = ops.adaln_norm(hidden, shift1, scale1, eps=self.eps)
        hidden = hidden + gate1[:, None] * self.attn1(normed)
        hidden = hidden + self.attn2(hidden, condition, mask)
        normed = ops.adaln_norm(hidden, shift2, scale2, eps=self.eps)
        return hidden + gate2[:, None] * self.ff(normed, grid)


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
            timestep: [B], integers 0..999 (1000 times the noise level).
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
        mask = None if mask is None else mask.bool()
        hidden = self.embed_latents(latents)
        condition = self.embed_condition(condition)
        modulation, embedding = self.time_embed(timestep)
        for block in self.transformer_blocks:
            hidden = block(hidden, modulation, condition, mask, grid)
        shift, scale = (self.scale_shift_table + embedding[:, None]).unbind(1)
        hidden = ops.adaln_norm(hidden, shift, scale, eps=self.config.norm_eps)
        return self.proj_out(hidden).transpose(1, 2).unflatten(2, grid)

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
