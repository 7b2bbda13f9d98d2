"""ReLU linear attention with one head-wise state per sample.

    S = sum_j relu(k_j) v_j^T,  z = sum_j relu(k_j),  y_i = relu(q_i) S / (relu(q_i) . z + eps)

Source: Xie et al., "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion
Transformers" (2024), section 2.2.
"""

# Shape suffixes: B = batch, N = tokens, H = heads, K = head width, D = channels.

from torch import Tensor, nn

from clipflow import ops
from clipflow.nn.head_norms import QK_NORM_EPS, norm_heads


class ReLULinearAttention(nn.Module):
    """Self-attention of linear cost in the number of tokens; the state is float32.

    Args:
        channels: D, the width of the input and output tokens.
        heads: H.
        head_dim: K.
        eps: added to the denominator.
        qk_norm: whether q and k go through an RMSNorm across all heads first (SANA-1.5).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        *,
        eps: float = 1e-15,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.eps = heads, eps
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])
        self.norm_q = nn.RMSNorm(inner, eps=QK_NORM_EPS) if qk_norm else None
        self.norm_k = nn.RMSNorm(inner, eps=QK_NORM_EPS) if qk_norm else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix `tokens` [B, N, D]; returns [B, N, D] in the same dtype."""
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1))
            for project in (self.to_q, self.to_k, self.to_v)
        )
        if self.norm_q is not None:
            q, k = norm_heads(q, k, self.norm_q, self.norm_k)
        return self.to_out[0](ops.linear_attention(q, k, v, eps=self.eps).flatten(2))
