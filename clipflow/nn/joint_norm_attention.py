"""Softmax attention whose queries and keys are normalized over all heads at once, then rotated.

Source: Zhuo et al., "Lumina-Next" (2024), section 2.1; the norms' place: Gao et al., "Lumina-T2X"
(2024), QK-Norm, as published checkpoints have it.
"""

# Shape suffixes: B = batch, N = queries, S = keys, H = heads, G = heads of keys, K = head width,
# D = channels.

from torch import Tensor, nn

from clipflow import ops

Rope = tuple[Tensor, Tensor]
NORM_EPS = 1e-5


class JointNormAttention(nn.Module):
    """Attention with grouped key heads, LayerNorm of whole queries and keys, no biases.

    Args:
        channels: D, the width of the tokens on both sides.
        heads: H.
        key_heads: G, a divisor of H.
        projected: whether `to_out` is there; the caller applies it.
    """

    def __init__(self, channels: int, heads: int, key_heads: int, *, projected: bool) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        grouped = channels // heads * key_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, grouped, bias=False)
        self.to_v = nn.Linear(channels, grouped, bias=False)
        self.norm_q = nn.LayerNorm(channels, eps=NORM_EPS)
        self.norm_k = nn.LayerNorm(grouped, eps=NORM_EPS)
        if projected:
            self.to_out = nn.ModuleList([nn.Linear(channels, channels, bias=False)])

    def forward(
        self,
        tokens: Tensor,
        source: Tensor,
        *,
        q_rope: Rope | None = None,
        k_rope: Rope | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """Attend from `tokens` [B, N, D] to `source` [B, S, D].

        Args:
            q_rope, k_rope: as of `clipflow.ops.qk_norm_rope`.
            key_lengths: [B] integers, how many of the first tokens of `source` are real; None when
                all are.

        Returns:
            [B, N, H, K], before the output's projection; dtype of `tokens`.
        """
        q = self.to_q(tokens).unflatten(-1, (self.heads, -1))
        k = self.to_k(source).unflatten(-1, (self.key_heads, -1))
        v = self.to_v(source).unflatten(-1, (self.key_heads, -1))
        norm_q, norm_k = self.norm_q, self.norm_k
        q, k = ops.qk_norm_rope(
            q, k, norm_q.weight, norm_k.weight, norm_q.bias, norm_k.bias,
            q_rope=q_rope, k_rope=k_rope, norm="layer", across_heads=True, interleaved=True,
            eps=NORM_EPS,
        )  # fmt: skip
        return ops.dit_attention(q, k, v, key_lengths=key_lengths)
