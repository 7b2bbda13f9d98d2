"""`LuminaNextDiT2DModel` of diffusers on fused ops.

The transformer's own forward fuses each block's last sum with the next block's norm, prepares the
rotary table once and attends by key lengths. Whatever that cannot serve goes through diffusers'
forward, whose blocks are then accelerated one by one.
"""

# Shape suffixes: B = batch, N = image tokens, L = caption tokens, H = heads, D = channels.

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers.models.attention_processor import Attention, LuminaAttnProcessor2_0
from diffusers.models.embeddings import LuminaCombinedTimestepCaptionEmbedding, LuminaPatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel, LuminaNextDiTBlock
from torch import Tensor, nn

from clipflow.acceleration import checks, lumina
from clipflow.acceleration.conditions import real_tokens
from clipflow.acceleration.lumina import Rope
from clipflow.acceleration.norms import rms_norm_replacement
from clipflow.acceleration.patches import unpatchify
from clipflow.acceleration.replace import Recipe, Replacement
from clipflow.acceleration.specimens import randomized

Options = dict[str, object]
PROJECTIONS = ("to_q", "to_k", "to_v")


class LuminaNextAttention:
    """Attention processor: queries and keys normed across heads and rotated, grouped heads."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Tensor | Rope | None = None,
        key_rotary_emb: Tensor | Rope | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        """As `LuminaAttnProcessor2_0`: [B, N, H, K], without the output's projection.

        Args:
            attention_mask: [B] integers, how many of the first keys are real; or a mask as there;
                None when all are.
            query_rotary_emb, key_rotary_emb: (cos, sin), float32 [N, K/2]; or complex rotations as
                there.
        """
        ropes = (query_rotary_emb, key_rotary_emb)
        if hidden_states.ndim != 3 or not _head_norms_are_plain(attn):
            return LuminaAttnProcessor2_0()(
                attn, hidden_states, encoder_hidden_states, attention_mask, *ropes,
                base_sequence_length,
            )  # fmt: skip
        q, k, v = lumina.project(attn, hidden_states, encoder_hidden_states)
        q, k = lumina.norm_and_rotate(attn, q, k, *ropes, across_heads=True)
        if attention_mask is not None and attention_mask.ndim > 2:
            attention_mask = attention_mask.view(len(q), -1)
        scale = q.shape[-1] ** -0.5
        if key_rotary_emb is not None:
            scale = lumina.proportional(attn.scale, q.shape[1], base_sequence_length)
        return lumina.attend(q, k, v, attention_mask, scale)


def _head_norms_are_plain(attn: Attention) -> bool:
    return attn.norm_q is None or checks.plain(nn.LayerNorm, attn.norm_q, attn.norm_k)


def block(
    self: LuminaNextDiTBlock,
    hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: Tensor,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor,
    temb: Tensor,
    cross_attention_kwargs: Options | None = None,
) -> Tensor:
    """The forward of `LuminaNextDiTBlock`, for whoever calls a block alone."""
    if not _block_is_plain(self) or not _known(cross_attention_kwargs):
        return type(self).forward(
            self, hidden_states, attention_mask, image_rotary_emb, encoder_hidden_states,
            encoder_mask, temb, cross_attention_kwargs,
        )  # fmt: skip
    masks = (attention_mask, encoder_mask)
    return _chain(
        [self], hidden_states, masks, image_rotary_emb, encoder_hidden_states, temb,
        cross_attention_kwargs,
    )  # fmt: skip


def _known(cross_attention_kwargs: Options | None) -> bool:
    return cross_attention_kwargs is not None and cross_attention_kwargs.keys() <= {
        "base_sequence_length"
    }


def _block_is_plain(part: LuminaNextDiTBlock) -> bool:
    norms = (part.norm2, part.ffn_norm1, part.ffn_norm2, part.norm1.norm)
    return (
        checks.carries(part.norm1, lumina.rms_norm_zero)
        and checks.plain(RMSNorm, *norms)
        and checks.bare(part.attn1, part.attn2)
        and all(
            type(attn.processor) is LuminaNextAttention and _head_norms_are_plain(attn)
            for attn in (part.attn1, part.attn2)
        )
    )


def _attend(
    part: LuminaNextDiTBlock,
    normed: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    rope: Tensor | Rope,
    condition: Tensor,
    options: Options,
) -> Tensor:
    """Self-attention plus gated cross-attention, projected, [B, N, D]."""
    attn1, attn2 = part.attn1, part.attn2
    own = attn1.processor(attn1, normed, normed, masks[0], rope, rope, **options)
    condition = part.norm1_context(condition)
    other = attn2.processor(attn2, normed, condition, masks[1], rope, None, **options)
    gate = part.gate.tanh()[:, None].to(own.dtype)
    return attn2.to_out[0](torch.addcmul(own, gate, other).flatten(2))


def _chain(
    blocks: Sequence[LuminaNextDiTBlock],
    hidden: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    rope: Tensor | Rope,
    condition: Tensor,
    temb: Tensor,
    options: Options,
) -> Tensor:
    return lumina.chain(
        blocks, hidden, temb,
        lambda part, normed: _attend(part, normed, masks, rope, condition, options),
    )  # fmt: skip


def transformer(
    self: LuminaNextDiT2DModel,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor,
    image_rotary_emb: Tensor,
    cross_attention_kwargs: Options | None = None,
    return_dict: bool = True,
) -> tuple[Tensor, ...] | Transformer2DModelOutput:
    """The forward of `LuminaNextDiT2DModel`."""
    caption = encoder_hidden_states
    if (
        not _known(cross_attention_kwargs)
        or caption.ndim != 3
        or encoder_mask.shape != caption.shape[:2]
        or not _is_plain(self)
    ):
        return type(self).forward(
            self, hidden_states, timestep, caption, encoder_mask, image_rotary_emb,
            cross_attention_kwargs, return_dict,
        )  # fmt: skip
    grid = tuple(side // self.patch_size for side in hidden_states.shape[2:])
    hidden, _, _, rope = self.patch_embedder(hidden_states, image_rotary_emb)
    rope = lumina.rope_tables(rope.to(hidden.device))
    temb = self.time_caption_embed(timestep, caption, encoder_mask)
    condition, keys = real_tokens(caption, encoder_mask)
    hidden = _chain(
        self.layers, hidden, (None, keys), rope, condition, temb, cross_attention_kwargs
    )
    sample = unpatchify(self.norm_out(hidden, temb), grid, self.patch_size)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _is_plain(model: LuminaNextDiT2DModel) -> bool:
    return all(checks.carries(part, block) and _block_is_plain(part) for part in model.layers)


def replacements(model: LuminaNextDiT2DModel) -> Iterator[Replacement]:
    """Check `model` and name its parts that run on fused ops."""
    _check_versions()
    checks.check_type("patch_embedder", model.patch_embedder, LuminaPatchEmbed)
    embed = model.time_caption_embed
    checks.check_type("time_caption_embed", embed, LuminaCombinedTimestepCaptionEmbedding)
    for index, part in enumerate(model.layers):
        checks.check_type(f"layers.{index}", part, LuminaNextDiTBlock)
        yield from _block_replacements(f"layers.{index}", part)
    yield lumina.norm_out_replacement("norm_out", model.norm_out)
    yield Replacement(
        name="",
        module=model,
        by=transformer,
        ops="sandwich_residual_norm across blocks, key lengths for masks",
    )


def _check_versions() -> None:
    """Raise where diffusers calls its parts otherwise than this file expects."""
    checks.check_parameters(
        LuminaNextDiT2DModel.forward, "hidden_states", "timestep", "encoder_hidden_states",
        "encoder_mask", "image_rotary_emb", "cross_attention_kwargs", "return_dict",
    )  # fmt: skip
    checks.check_parameters(
        LuminaNextDiTBlock.forward, "hidden_states", "attention_mask", "image_rotary_emb",
        "encoder_hidden_states", "encoder_mask", "temb", "cross_attention_kwargs",
    )  # fmt: skip
    checks.check_parameters(
        LuminaAttnProcessor2_0.__call__, "attn", "hidden_states", "encoder_hidden_states",
        "attention_mask", "query_rotary_emb", "key_rotary_emb", "base_sequence_length",
    )  # fmt: skip
    checks.check_parameters(LuminaPatchEmbed.forward, "x", "freqs_cis")
    checks.check_parameters(
        LuminaCombinedTimestepCaptionEmbedding.forward, "timestep", "caption_feat", "caption_mask"
    )


def _block_replacements(name: str, part: LuminaNextDiTBlock) -> Iterator[Replacement]:
    yield lumina.rms_norm_zero_replacement(f"{name}.norm1", part.norm1)
    lumina.check_norms(name, part, part.norm1.norm)
    yield rms_norm_replacement(f"{name}.norm1_context", part.norm1_context)
    checks.check_type(f"{name}.attn1.to_out", part.attn1.to_out, nn.Identity)
    checks.check_linear_layers(f"{name}.attn2", part.attn2, "to_out.0")
    for key in ("attn1", "attn2"):
        attn, inner = getattr(part, key), f"{name}.{key}"
        checks.check_type(inner, attn, Attention)
        checks.check_type(f"{inner}.processor", attn.processor, LuminaAttnProcessor2_0)
        checks.check_linear_layers(inner, attn, *PROJECTIONS)
        if attn.norm_q is not None or attn.norm_k is not None:
            lumina.check_head_norms(inner, attn, nn.LayerNorm)
        yield Replacement(
            name=inner, module=attn, attribute="processor", by=LuminaNextAttention(),
            ops="qk_norm_rope, dit_attention",
        )  # fmt: skip
    yield lumina.feed_forward_replacement(f"{name}.feed_forward", part.feed_forward)
    yield Replacement(name=name, module=part, by=block, ops="sandwich_residual_norm")


def int8_layers(model: LuminaNextDiT2DModel) -> Iterator[str]:
    """The attention and feed-forward layers of all blocks."""
    projections = [f"{attn}.{key}" for attn in ("attn1", "attn2") for key in PROJECTIONS]
    for index, _ in enumerate(model.layers):
        for layer in (*projections, "attn2.to_out.0", *lumina.FEED_FORWARD):
            yield f"layers.{index}.{layer}"


def specimen() -> tuple[LuminaNextDiT2DModel, dict[str, object]]:
    """A tiny model with grouped heads, and a call of it."""
    model = LuminaNextDiT2DModel(
        patch_size=2, in_channels=2, hidden_size=16, num_layers=2, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, cross_attention_dim=4,
    )  # fmt: skip
    angle = torch.randn(4, 4, 4)
    return randomized(model), {
        "hidden_states": torch.randn(2, 2, 8, 6),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": torch.randn(2, 3, 4),
        "encoder_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "image_rotary_emb": torch.polar(torch.ones_like(angle), angle),
        "cross_attention_kwargs": {"base_sequence_length": 5},
        "return_dict": False,
    }


RECIPE = Recipe(
    kind=LuminaNextDiT2DModel,
    replacements=replacements,
    int8_layers=int8_layers,
    specimen=specimen,
)
