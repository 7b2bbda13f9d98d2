"""What the Lumina transformers of diffusers share: feed-forward, norms, rotary embedding."""

# Shape suffixes: B = batch, L = queries, S = keys, H = heads, K = head width, D = channels.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.models.activations import FP32SiLU
from diffusers.models.attention import LuminaFeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import (
    LuminaLayerNormContinuous,
    LuminaRMSNormZero,
    RMSNorm,
)
from torch import Tensor, nn

from clipflow import ops
from clipflow.acceleration import checks
from clipflow.acceleration.norms import check_rms_norm, rms_norm
from clipflow.acceleration.replace import Replacement
from clipflow.nn.cross_attention import real_tokens_first

Rope = tuple[Tensor, Tensor]
FEED_FORWARD = tuple(f"feed_forward.linear_{number}" for number in (1, 2, 3))


def feed_forward(self: LuminaFeedForward, x: Tensor) -> Tensor:
    """The forward of `LuminaFeedForward`."""
    if not checks.plain(FP32SiLU, self.silu):
        return type(self).forward(self, x)
    return self.linear_2(ops.swiglu(self.linear_1(x), self.linear_3(x)))


def rms_norm_zero(
    self: LuminaRMSNormZero, x: Tensor, emb: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of `LuminaRMSNormZero`: (normed, gate_msa, scale_mlp, gate_mlp)."""
    if not checks.plain(RMSNorm, self.norm) or self.norm.weight.dtype is not x.dtype:
        return type(self).forward(self, x, emb)
    scale_msa, *gates = modulation(self, emb, x.dtype)
    return modulated_rms(x, scale_msa, self.norm), *gates


def modulation(norm: LuminaRMSNormZero, emb: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(scale_msa, gate_msa, scale_mlp, gate_mlp), [B, D] each."""
    return norm.linear(norm.silu(emb)).to(dtype).chunk(4, dim=1)


def modulated_rms(x: Tensor, scale: Tensor, norm: RMSNorm) -> Tensor:
    """norm(x) * (1 + scale), in the dtype of `x`."""
    weight = norm.weight.to(x.dtype)
    return ops.adaln_norm(x, None, scale, weight=weight, norm="rms", eps=norm.eps)


def norm_out(self: LuminaLayerNormContinuous, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """The forward of `LuminaLayerNormContinuous`."""
    if not checks.plain(nn.LayerNorm, self.norm):
        return type(self).forward(self, x, conditioning_embedding)
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype)).to(x.dtype)
    return self.linear_2(ops.adaln_norm(x, None, scale, eps=self.norm.eps))


def stream(hidden: Tensor, norm: RMSNorm) -> Tensor:
    """The residual stream in the dtype that diffusers gives it; another one in autocast."""
    return hidden.to(torch.promote_types(hidden.dtype, norm.weight.dtype))


def sandwich(
    hidden: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, norm: RMSNorm, following: RMSNorm
) -> tuple[Tensor, Tensor]:
    """(hidden + tanh(gate) * norm(branch), following(that) * (1 + scale))."""
    dtype = hidden.dtype
    return ops.sandwich_residual_norm(
        hidden, branch.to(dtype), gate, scale,
        weight=norm.weight.to(dtype), next_weight=following.weight.to(dtype), eps=norm.eps,
    )  # fmt: skip


def add_branch(hidden: Tensor, branch: Tensor, gate: Tensor | None, norm: RMSNorm) -> Tensor:
    """hidden + tanh(gate) * norm(branch); None is a gate of 1."""
    normed = rms_norm(norm, branch.to(hidden.dtype))
    return hidden + normed if gate is None else torch.addcmul(hidden, gate.tanh()[:, None], normed)


def chain(
    blocks: Sequence[nn.Module],
    hidden: Tensor,
    temb: Tensor,
    attend: Callable[[nn.Module, Tensor], Tensor],
) -> Tensor:
    """Modulated blocks one after the other, each sum fused with the norm that follows.

    Args:
        hidden: the residual stream, [B, L, D].
        temb: embedding of the time, [B, min(D, 1024)].
        attend: (a block, its normed input [B, L, D]) to its attention branch [B, L, D].
    """
    if not len(blocks):
        return hidden
    hidden = stream(hidden, blocks[0].norm2)
    rows = [modulation(part.norm1, temb, hidden.dtype) for part in blocks]
    normed = modulated_rms(hidden, rows[0][0], blocks[0].norm1.norm)
    for index, part in enumerate(blocks):
        _, gate, scale, last_gate = rows[index]
        branch = attend(part, normed)
        hidden, normed = sandwich(hidden, branch, gate, scale, part.norm2, part.ffn_norm1)
        branch = part.feed_forward(normed)
        if index + 1 < len(blocks):
            hidden, normed = sandwich(
                hidden, branch, last_gate, rows[index + 1][0],
                part.ffn_norm2, blocks[index + 1].norm1.norm,
            )  # fmt: skip
    return add_branch(hidden, branch, last_gate, part.ffn_norm2)


def rope_tables(rope: Tensor | Rope) -> Rope:
    """(cos, sin), float32 [tokens, K/2], of complex rotations [B or 1, tokens of each, K/2]."""
    if isinstance(rope, tuple):
        return rope
    rope = rope.flatten(0, 1)
    return rope.real.float().contiguous(), rope.imag.float().contiguous()


def project(attn: Attention, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, L, H, K] of `queries` and k, v [B, S, G, K] of `keys`."""
    q = attn.to_q(queries).unflatten(-1, (attn.heads, -1))
    k, v = (to(keys).unflatten(-1, (-1, q.shape[-1])) for to in (attn.to_k, attn.to_v))
    return q, k, v


def norm_and_rotate(
    attn: Attention, q: Tensor, k: Tensor, q_rope: object, k_rope: object, *, across_heads: bool
) -> tuple[Tensor, Tensor]:
    """Normalized and rotated q and k; the angles may differ from sample to sample."""
    affine: dict[str, Tensor] = {}
    for side, norm in (("q", attn.norm_q), ("k", attn.norm_k)):
        if norm is not None:
            affine |= {f"{side}_weight": norm.weight.to(q.dtype)}
            if (bias := getattr(norm, "bias", None)) is not None:
                affine |= {f"{side}_bias": bias.to(q.dtype)}
    kind = "none" if attn.norm_q is None else "layer" if across_heads else "rms"
    ropes = {"q_rope": q_rope, "k_rope": k_rope}
    ropes = {name: rope_tables(rope) for name, rope in ropes.items() if rope is not None}
    # One table for all samples, or the tables of all samples on end, as is then the batch.
    flat = len(q) > 1 and any(len(table[0]) != q.shape[1] for table in ropes.values())
    shapes = (q.shape, k.shape)
    if flat:
        q, k = q.flatten(0, 1)[None], k.flatten(0, 1)[None]
    q, k = ops.qk_norm_rope(
        q, k, **affine, **ropes, norm=kind, across_heads=across_heads, interleaved=True,
        eps=1e-5 if attn.norm_q is None else attn.norm_q.eps,
    )  # fmt: skip
    return q.view(shapes[0]), k.view(shapes[1])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention [B, L, H, K].

    Args:
        mask: [B] integers, how many of the first keys are real; or [B, S], nonzero where a key is
            real; None when all are.
    """
    if mask is not None and mask.ndim == 2:
        real, shape = mask.bool(), k.shape
        k, v = (real_tokens_first(t.flatten(2), real)[0].view(shape) for t in (k, v))
        mask = real.sum(dim=1)
    return ops.dit_attention(q, k, v, key_lengths=mask, scale=scale)


def proportional(scale: float, tokens: int, base_sequence_length: int | None) -> float:
    """The softmax scale under proportional attention, which keeps the entropy of `base` tokens."""
    if base_sequence_length is None:
        return scale
    return math.sqrt(math.log(tokens, base_sequence_length)) * scale


def check_norms(name: str, part: nn.Module, first: RMSNorm) -> None:
    """Raise unless the sandwich norms of a block are RMSNorms with weights and one eps."""
    norms = {"norm2": part.norm2, "ffn_norm1": part.ffn_norm1, "ffn_norm2": part.ffn_norm2}
    for key, norm in {"norm1": first, **norms}.items():
        check_rms_norm(f"{name}.{key}", norm)
        checks.check_value(f"{name}.{key}.eps", norm.eps, part.norm2.eps)


def check_head_norms(name: str, attn: Attention, kind: type[nn.Module]) -> None:
    """Raise unless queries and keys are both normed by `kind` with a weight and one eps."""
    for key in ("norm_q", "norm_k"):
        norm = getattr(attn, key)
        checks.check_type(f"{name}.{key}", norm, kind)
        checks.check_value(f"{name}.{key}.eps", norm.eps, attn.norm_q.eps)
        checks.check_value(f"{name}.{key}.elementwise_affine", norm.elementwise_affine, True)


def feed_forward_replacement(name: str, part: nn.Module) -> Replacement:
    """`part` on `feed_forward`, if it is a LuminaFeedForward."""
    checks.check_parameters(LuminaFeedForward.forward, "x")
    checks.check_type(name, part, LuminaFeedForward)
    checks.check_type(f"{name}.silu", part.silu, FP32SiLU)
    return Replacement(name=name, module=part, by=feed_forward, ops="swiglu")


def rms_norm_zero_replacement(name: str, part: nn.Module) -> Replacement:
    """`part` on `rms_norm_zero`, if it is a LuminaRMSNormZero."""
    checks.check_parameters(LuminaRMSNormZero.forward, "x", "emb")
    checks.check_type(name, part, LuminaRMSNormZero)
    check_rms_norm(f"{name}.norm", part.norm)
    return Replacement(name=name, module=part, by=rms_norm_zero, ops="adaln_norm")


def norm_out_replacement(name: str, part: nn.Module) -> Replacement:
    """`part` on `norm_out`, if it is a LuminaLayerNormContinuous without parameters in its norm."""
    checks.check_parameters(LuminaLayerNormContinuous.forward, "x", "conditioning_embedding")
    checks.check_type(name, part, LuminaLayerNormContinuous)
    checks.check_plain_layer_norm(f"{name}.norm", part.norm)
    checks.check_type(f"{name}.linear_2", part.linear_2, nn.Linear)
    return Replacement(name=name, module=part, by=norm_out, ops="adaln_norm")
