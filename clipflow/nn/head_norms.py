"""RMSNorm of queries and keys across all heads, as SANA-1.5 has it.

Source: Xie et al., "SANA 1.5" (2025), section 3.1 (norms that keep large models stable).
"""

# Shape suffixes: B = batch, L = queries, S = keys, H = heads, K = head width.

from __future__ import annotations

from torch import Tensor, nn

from clipflow import ops

QK_NORM_EPS = 1e-5


def norm_heads(
    q: Tensor, k: Tensor, norm_q: nn.RMSNorm, norm_k: nn.RMSNorm
) -> tuple[Tensor, Tensor]:
    """`q` [B, L, H, K] and `k` [B, S, H, K] normed by token; dtype and shapes stay."""
    return ops.qk_norm_rope(
        q, k, norm_q.weight, norm_k.weight, norm="rms", across_heads=True, eps=norm_q.eps
    )
