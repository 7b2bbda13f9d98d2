"""The weights of a SANA block as a plan uses them."""

# Shape suffixes: R = rows, N = image tokens, T = condition tokens, H = heads, K = width of a head,
# D = channels.

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from clipflow import ops
from clipflow.models.dits.linears import Linear, LinearLike
from clipflow.nn.cross_attention import CrossAttention
from clipflow.nn.linear_attention import ReLULinearAttention
from clipflow.nn.packing import packed

if TYPE_CHECKING:
    from clipflow.models.dits.sana import SanaBlock

# (weight of queries, weight of keys, eps)
Norms = tuple[Tensor, Tensor, float]


class BlockWeights:
    """The matrices of one block; those that multiply the same tokens are packed."""

    def __init__(
        self, block: SanaBlock, linear: Callable[[Tensor, Tensor | None], LinearLike]
    ) -> None:
        own, cross, ff = block.attn1, block.attn2, block.ff
        self.qkv = linear(packed([own.to_q.weight, own.to_k.weight, own.to_v.weight]), None)
        self.own_out = linear(own.to_out[0].weight, own.to_out[0].bias)
        self.query = linear(cross.to_q.weight, cross.to_q.bias)
        self.cross_out = linear(cross.to_out[0].weight, cross.to_out[0].bias)
        self.inverted = linear(ff.conv_inverted.weight, ff.conv_inverted.bias)
        self.depth = (ff.conv_depth.weight.detach(), ff.conv_depth.bias.detach())
        self.point = linear(ff.conv_point.weight, None)
        self.own_norms = norm_weights(own)
        self.cross_norms = norm_weights(cross)
        # Keys and values are computed once per condition: always in full precision.
        self.key_value = KeyValue(cross)
        self.tables = block.scale_shift_table.detach()


class KeyValue:
    """Keys, normed where they are to be, and values of condition tokens."""

    def __init__(self, cross: CrossAttention) -> None:
        self.linear = Linear(
            packed([cross.to_k.weight, cross.to_v.weight]),
            packed([cross.to_k.bias, cross.to_v.bias]),
        )
        self.norm = cross.norm_k

    def __call__(self, tokens: Tensor, out: Tensor) -> None:
        """Write [k, v], [T, 2 D], of `tokens` [T, D] to `out`."""
        self.linear(tokens, out)
        if self.norm is not None:
            keys = out[:, : out.shape[1] // 2]
            keys.copy_(self.norm(keys))


def norm_weights(
    attention: ReLULinearAttention | CrossAttention,
) -> Norms | None:
    """(weight of queries, weight of keys, eps) of the norms, where there are any."""
    if attention.norm_q is None:
        return None
    q, k = attention.norm_q, attention.norm_k
    return q.weight.detach(), k.weight.detach(), q.eps


def norm_heads(
    q: Tensor, k: Tensor, norms: Norms, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Queries and keys, [R, N, H, K] each, normed across heads into `out`."""
    q_weight, k_weight, eps = norms
    return ops.qk_norm_rope(
        q, k, q_weight, k_weight, norm="rms", across_heads=True, eps=eps, out=out
    )
