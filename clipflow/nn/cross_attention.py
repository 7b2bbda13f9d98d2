"""Softmax cross-attention from image tokens to condition tokens."""

# Shape suffixes: B = batch, N = image tokens, L = condition tokens, H = heads, D = channels.

import torch
from torch import Tensor, nn

from clipflow import ops
from clipflow.nn.head_norms import QK_NORM_EPS, norm_heads


class CrossAttention(nn.Module):
    """Multi-head attention with biased projections.

    Args:
        channels: D, the width of the image tokens and of the condition tokens.
        heads: H.
        head_dim: width of one head; the softmax scale is its inverse square root.
        qk_norm: whether q and k go through an RMSNorm across all heads first (SANA-1.5).
    """

    def __init__(self, channels: int, heads: int, head_dim: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])
        self.norm_q = nn.RMSNorm(inner, eps=QK_NORM_EPS) if qk_norm else None
        self.norm_k = nn.RMSNorm(inner, eps=QK_NORM_EPS) if qk_norm else None

    def forward(
        self, tokens: Tensor, condition: Tensor, key_lengths: Tensor | None = None
    ) -> Tensor:
        """Attend from `tokens` [B, N, D] to `condition` [B, L, D].

        Args:
            key_lengths: [B] integers, how many of the first condition tokens are real; None when
                all are.

        Returns:
            [B, N, D], dtype of `tokens`.
        """
        q = self._heads(self.to_q(tokens))
        k, v = self._heads(self.to_k(condition)), self._heads(self.to_v(condition))
        if self.norm_q is not None:
            q, k = norm_heads(q, k, self.norm_q, self.norm_k)
        mixed = ops.dit_attention(q, k, v, key_lengths=key_lengths)
        return self.to_out[0](mixed.flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1))


def real_tokens_first(condition: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the real tokens of `condition` [B, L, D] to the front, as their number is all we keep.

    Attention sums over condition tokens without regard to their order.

    Args:
        mask: [B, L] bool, True where a token is real, e.g. left-padded prompts.

    Returns:
        (condition in that order, number of real tokens [B] int64).
    """
    order = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    return condition.gather(1, order[..., None].expand_as(condition)), mask.sum(dim=1)
