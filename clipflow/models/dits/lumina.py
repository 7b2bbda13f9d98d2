"""The diffusion transformer of BLIP3-o: Lumina-Next with a condition of any width.

    h += tanh(g1) RMS(Attn(x) Wo),  x = RMS(h) (1 + s1);   h += tanh(g2) RMS(FFN(RMS(h) (1 + s2)))

where Attn adds self-attention and, gated per head, cross-attention to the condition, and s1, g1,
s2, g2 are made of the time and the mean of the condition.

Source: Zhuo et al., "Lumina-Next" (2024), section 2.1; Chen et al., "BLIP3-o" (2025); parameter
names are those of published checkpoints below `model.dit.model.`.
"""

# Shape suffixes: B = batch, N = image tokens, L = condition tokens, D = channels, E = width of the
# time embedding, H = heads, p = patch size.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow import ops
from clipflow.errors import ShapeError
from clipflow.models.dits.linears import can_quantize
from clipflow.nn.caption_embedding import CaptionProjection, TimeCaptionEmbedding
from clipflow.nn.cross_attention import real_tokens_first
from clipflow.nn.embeddings import rope_table_2d
from clipflow.nn.joint_norm_attention import JointNormAttention, Rope
from clipflow.nn.swiglu_feed_forward import SwiGLUFeedForward

if TYPE_CHECKING:
    from clipflow.models.dits.lumina_denoiser import LuminaDenoiser
    from clipflow.sampling.plan import PlanSpec

OUT_NORM_EPS = 1e-6
WIDEST_EMBEDDING = 1024


@dataclass(frozen=True, kw_only=True)
class LuminaConfig:
    """Sizes of the transformer. D = hidden_size.

    Attributes:
        in_channels: of the latents, and of the velocity.
        num_kv_heads: a divisor of `num_attention_heads`.
        intermediate_size: hidden width of the feed-forward layers; of published checkpoints it is
            `feed_forward_width(hidden_size)`.
        condition_channels: width of the condition tokens, that of the language model.
        patch_size: latents of p x p places are one token.
    """

    in_channels: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    intermediate_size: int
    condition_channels: int
    patch_size: int
    norm_eps: float
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        """E, the width of the embedding of time and condition."""
        return min(self.hidden_size, WIDEST_EMBEDDING)


def feed_forward_width(hidden_size: int, multiple_of: int = 256) -> int:
    """Two thirds of four times `hidden_size`, rounded up to a multiple: 4864 for 1792.

    Later versions of the library that published checkpoints were made with leave out the two
    thirds, which gives 7168.
    """
    return -(-int(2 * (4 * hidden_size) / 3) // multiple_of) * multiple_of


class ModulatedNorm(nn.Module):
    """A norm's weight, and what makes its block's scales and gates of the embedding.

    The rows of `linear` are (scale, gate) of attention, then (scale, gate) of the feed-forward.
    """

    def __init__(self, channels: int, embedding: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding, 4 * channels)
        self.norm = nn.RMSNorm(channels, eps=eps)

    def modulation(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """(s1, g1, s2, g2), [B, D] each, of `embedding` [B, E], after its SiLU; before tanh."""
        return self.linear(embedding).chunk(4, dim=-1)


class LuminaBlock(nn.Module):
    """Attention and feed-forward layer; the norms around them are fused by the transformer."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        D, H, eps = config.hidden_size, config.num_attention_heads, config.norm_eps
        self.gate = nn.Parameter(torch.zeros(H))
        self.attn1 = JointNormAttention(D, H, config.num_kv_heads, projected=False)
        self.attn2 = JointNormAttention(D, H, config.num_kv_heads, projected=True)
        self.feed_forward = SwiGLUFeedForward(D, config.intermediate_size)
        self.norm1 = ModulatedNorm(D, config.embedding_width, eps)
        self.norm1_context = nn.RMSNorm(D, eps=eps)
        self.norm2 = nn.RMSNorm(D, eps=eps)
        self.ffn_norm1 = nn.RMSNorm(D, eps=eps)
        self.ffn_norm2 = nn.RMSNorm(D, eps=eps)

    def attend(
        self, normed: Tensor, caption: Tensor, key_lengths: Tensor | None, rope: Rope
    ) -> Tensor:
        """The attention branch of `normed` [B, N, D] under `caption` [B, L, D]; returns [B, N, D].

        Args:
            key_lengths: [B], how many of the first tokens of `caption` are real; None for all.
            rope: (cos, sin) of the image tokens' places.
        """
        own = self.attn1(normed, normed, q_rope=rope, k_rope=rope)
        context = self.norm1_context(caption)
        other = self.attn2(normed, context, q_rope=rope, key_lengths=key_lengths)
        mixed = torch.addcmul(own, self.gate.tanh()[:, None], other)
        return self.attn2.to_out[0](mixed.flatten(2))


class LuminaTransformer(nn.Module):
    """Predicts the flow-matching velocity of a latent grid under a condition."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.config = config
        D, E, values = config.hidden_size, config.embedding_width, patch_values(config)
        self.patch_embedder = nn.ModuleDict({"proj": nn.Linear(values, D)})
        self.caption_projection = CaptionProjection(config.condition_channels, D)
        self.time_caption_embed = TimeCaptionEmbedding(D, E)
        self.layers = nn.ModuleList(LuminaBlock(config) for _ in range(config.num_layers))
        self.norm_out = nn.ModuleDict(
            {"linear_1": nn.Linear(E, D), "linear_2": nn.Linear(D, values)}
        )

    def forward(
        self, latents: Tensor, timestep: Tensor, condition: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Velocity (noise minus data) at one time for each sample.

        Args:
            latents: [B, in_channels, h, w], h and w multiples of p.
            timestep: [B], 0..1000, integers or floats (1000 times the noise level).
            condition: [B, L, condition_channels]; zeros are the null condition.
            mask: [B, L], nonzero where a condition token is real; None when all are. Others are
                neither attended to nor part of the mean that the time embedding takes. Published
                models never saw any.

        Returns:
            [B, in_channels, h, w], dtype of `latents`.

        Raises:
            ShapeError: `latents` does not have the configured number of channels, or its grid does
                not fall into patches.
        """
        check_latents(self.config, latents)
        grid = self.token_grid(*latents.shape[2:])
        caption, key_lengths = self.caption_projection(condition), None
        mask = None if mask is None else mask.bool()
        embedding = F.silu(self.time_caption_embed(timestep, caption, mask))
        if mask is not None:
            caption, key_lengths = real_tokens_first(caption, mask)
        hidden = self._through_blocks(
            self.embed_latents(latents), embedding, caption, key_lengths, self.rope_table(grid)
        )
        scale = self.norm_out["linear_1"](embedding)
        normed = ops.adaln_norm(hidden, None, scale, eps=OUT_NORM_EPS)
        return self.unpatched(self.norm_out["linear_2"](normed), grid)

    @torch.no_grad()
    def denoiser(self, spec: PlanSpec) -> LuminaDenoiser:
        """The transformer prepared for a sampling plan; see `clipflow.sampling.PlanCache`."""
        from clipflow.models.dits.lumina_denoiser import LuminaDenoiser
        from clipflow.models.dits.lumina_quantized import QuantizedLuminaDenoiser

        quantized = spec.tier == "fast" and can_quantize(spec.device)
        return (QuantizedLuminaDenoiser if quantized else LuminaDenoiser)(self, spec)

    def plan_bytes(self, spec: PlanSpec) -> int:
        """Bytes that `denoiser` allocates, less what is made of the weights, 8-bit ones too."""
        from clipflow.models.dits.lumina_denoiser import plan_bytes

        return plan_bytes(self, spec)

    def quantized_bytes(self, device: torch.device) -> int:
        """Bytes of the 8-bit weights that all plans of the fast tier on `device` share."""
        from clipflow.models.dits.lumina_quantized import quantized_bytes

        return quantized_bytes(self, device)

    def _through_blocks(
        self,
        hidden: Tensor,
        embedding: Tensor,
        caption: Tensor,
        key_lengths: Tensor | None,
        rope: Rope,
    ) -> Tensor:
        """The residual stream [B, N, D] after all blocks, each sum fused with the next norm."""
        blocks, eps = self.layers, self.config.norm_eps
        rows = [block.norm1.modulation(embedding) for block in blocks]
        normed = ops.adaln_norm(
            hidden, None, rows[0][0], weight=blocks[0].norm1.norm.weight, norm="rms", eps=eps
        )
        for index, block in enumerate(blocks):
            _, gate, scale, last_gate = rows[index]
            branch = block.attend(normed, caption, key_lengths, rope)
            hidden, normed = ops.sandwich_residual_norm(
                hidden, branch, gate, scale,
                weight=block.norm2.weight, next_weight=block.ffn_norm1.weight, eps=eps,
            )  # fmt: skip
            branch = block.feed_forward(normed)
            if index + 1 < len(blocks):
                hidden, normed = ops.sandwich_residual_norm(
                    hidden, branch, last_gate, rows[index + 1][0],
                    weight=block.ffn_norm2.weight,
                    next_weight=blocks[index + 1].norm1.norm.weight, eps=eps,
                )  # fmt: skip
        return torch.addcmul(hidden, last_gate.tanh()[:, None], block.ffn_norm2(branch))

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an h x w latent grid."""
        p = self.config.patch_size
        return height // p, width // p

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Tokens [B, N, D] of `latents` [B, in_channels, h, w]."""
        return self.patch_embedder["proj"](patched(latents, self.config.patch_size))

    def rope_table(self, grid: tuple[int, int]) -> Rope:
        """(cos, sin), float32 [N, head_dim / 2], of the tokens of `grid`, on the model's device."""
        config, device = self.config, self.patch_embedder["proj"].weight.device
        return rope_table_2d(*grid, config.head_dim, base=config.rope_theta, device=device)

    def unpatched(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, in_channels, h, w] of the last layer's `values`, [B, N, in_channels * p * p].

        A token's values are ordered row, column, channel; those that `embed_latents` reads are
        ordered channel, row, column.
        """
        p = self.config.patch_size
        if p == 1:
            return values.transpose(1, 2).unflatten(2, grid)
        places = values.unflatten(2, (p, p, -1)).unflatten(1, grid)  # [B, h/p, w/p, p, p, C]
        return places.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_values(config: LuminaConfig) -> int:
    """Numbers in a patch of the latents."""
    return config.in_channels * config.patch_size**2


def patched(latents: Tensor, patch_size: int) -> Tensor:
    """Patches of `latents` [B, C, h, w], row-major, as [B, N, C * p * p]."""
    if patch_size == 1:
        return latents.flatten(2).transpose(1, 2)
    return F.unfold(latents, patch_size, stride=patch_size).transpose(1, 2)


def check_latents(config: LuminaConfig, latents: Tensor) -> None:
    p = config.patch_size
    good = latents.ndim == 4 and latents.shape[1] == config.in_channels
    if not good or latents.shape[2] % p or latents.shape[3] % p:
        sides = "h, w" if p == 1 else f"{p} h, {p} w"
        raise ShapeError(
            f"lumina: latents must be [B, {config.in_channels}, {sides}], got {list(latents.shape)}"
        )
