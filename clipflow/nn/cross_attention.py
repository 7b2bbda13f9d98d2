"""Softmax cross-attention from image tokens to condition tokens."""

# Shape suffixes: B = batch, N = image tokens, L = condition tokens, H = heads, D = channels.

from torch import Tensor, nn
from torch.nn import functional as F

from clipflow import ops


class CrossAttention(nn.Module):
    """Multi-head attention with biased projections and a key mask.

    Args:
        channels: D, the width of the image tokens and of the condition tokens.
        heads: H.
        head_dim: width of one head; the softmax scale is its inverse square root.
    """

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, tokens: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from `tokens` [B, N, D] to `condition` [B, L, D].

        Args:
            mask: [B, L] bool, True where a condition token is real; None when all are.

        Returns:
            [B, N, D], dtype of `tokens`.
        """
        q = self._heads(self.to_q(tokens))
        k, v = self._heads(self.to_k(condition)), self._heads(self.to_v(condition))
        if mask is None:
            mixed = ops.dit_attention(q, k, v)
        else:
            # Prompts are padded on the left, which key lengths cannot say.
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
            mixed = mixed.transpose(1, 2)
        return self.to_out[0](mixed.flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1))
