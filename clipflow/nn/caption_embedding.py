"""Condition tokens at the door of a diffusion transformer, and what they say as a whole."""

# Shape suffixes: B = batch, L = condition tokens, D = channels, E = width of the time embedding.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.nn.embeddings import TimestepEmbedding

MEAN_NORM_EPS = 1e-5


class CaptionProjection(nn.Module):
    """Linear - GELU(tanh) - Linear on the condition tokens."""

    def __init__(self, in_features: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(caption), approximate="tanh"))


class TimeCaptionEmbedding(nn.Module):
    """The embedding of the time plus Linear(LayerNorm(mean over the condition tokens)).

    Source: Zhuo et al., "Lumina-Next" (2024), the timestep and pooled-text conditioning.

    Args:
        caption_channels: D, of the condition tokens.
        channels: E.
    """

    def __init__(self, caption_channels: int, channels: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(channels)
        self.caption_embedder = nn.Sequential(
            nn.LayerNorm(caption_channels, eps=MEAN_NORM_EPS),
            nn.Linear(caption_channels, channels),
        )

    def forward(self, timestep: Tensor, caption: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed `timestep` [B] and `caption` [B, L, D]; returns [B, E].

        Args:
            mask: [B, L] bool, the tokens that the mean is over; None for all.
        """
        return self.timestep_embedder(timestep) + self.embed_caption(caption, mask)

    def embed_caption(self, caption: Tensor, mask: Tensor | None = None) -> Tensor:
        """The half of the condition, [B, E]; the mean is float32."""
        return self.caption_embedder(mean_of_tokens(caption, mask))


def mean_of_tokens(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `tokens` [B, L, D] over those where `mask` [B, L] is True; zeros where none is.

    Returns:
        [B, D], dtype of `tokens`; summed in float32 (float64 tokens in float64).
    """
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if mask is None:
        return wide.mean(dim=1).to(tokens.dtype)
    # What is masked may be anything, infinities too.
    total = wide.masked_fill(~mask[..., None], 0.0).sum(dim=1)
    return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(tokens.dtype)
