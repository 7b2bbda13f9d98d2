"""`Lumina2Transformer2DModel` of diffusers on fused ops.

The transformer's own forward fuses each block's last sum with the next block's norm, prepares the
rotary tables once and attends by key lengths. Whatever that cannot serve goes through diffusers'
forward, whose blocks are then accelerated one by one.
"""

# Shape suffixes: B = batch, N = image tokens, L = caption tokens, K = head width, D = channels.

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_lumina2 import (
    Lumina2AttnProcessor2_0,
    Lumina2CombinedTimestepCaptionEmbedding,
    Lumina2RotaryPosEmbed,
    Lumina2Transformer2DModel,
    Lumina2TransformerBlock,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clipflow.acceleration import checks, lumina
from clipflow.acceleration.conditions import is_token_mask
from clipflow.acceleration.lumina import Rope
from clipflow.acceleration.norms import rms_norm, rms_norm_replacement
from clipflow.acceleration.patches import unpatchify
from clipflow.acceleration.replace import Recipe, Replacement
from clipflow.acceleration.specimens import randomized

BLOCKS = ("noise_refiner", "context_refiner", "layers")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class Lumina2Attention:
    """Attention processor: normalized and rotated queries and keys, key lengths, grouped heads."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | Rope | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        """As `Lumina2AttnProcessor2_0`.

        Args:
            attention_mask: [B] integers, how many of the first keys are real; or a mask as there.
            image_rotary_emb: (cos, sin), float32 [tokens, K/2], of one sample or of all on end; or
                complex rotations as there.
        """
        rope = image_rotary_emb
        if not checks.plain(RMSNorm, attn.norm_q, attn.norm_k):
            return Lumina2AttnProcessor2_0()(
                attn, hidden_states, encoder_hidden_states, attention_mask, rope,
                base_sequence_length,
            )  # fmt: skip
        q, k, v = lumina.project(attn, hidden_states, encoder_hidden_states)
        q, k = lumina.norm_and_rotate(attn, q, k, rope, rope, across_heads=False)
        if attention_mask is not None and attention_mask.ndim > 2:
            attention_mask = attention_mask.view(len(q), -1)
        scale = lumina.proportional(attn.scale, q.shape[1], base_sequence_length)
        mixed = lumina.attend(q, k, v, attention_mask, scale).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))


def block(
    self: Lumina2TransformerBlock,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: Tensor | Rope,
    temb: Tensor | None = None,
) -> Tensor:
    """The forward of `Lumina2TransformerBlock`, with or without modulation."""
    if not _block_is_plain(self):
        return type(self).forward(self, hidden_states, attention_mask, image_rotary_emb, temb)
    if self.modulation:
        return _chain([self], hidden_states, attention_mask, image_rotary_emb, temb)
    hidden = lumina.stream(hidden_states, self.norm2)
    branch = _attend(self, rms_norm(self.norm1, hidden), attention_mask, image_rotary_emb)
    hidden = lumina.add_branch(hidden, branch, None, self.norm2)
    branch = self.feed_forward(rms_norm(self.ffn_norm1, hidden))
    return lumina.add_branch(hidden, branch, None, self.ffn_norm2)


def _block_is_plain(part: Lumina2TransformerBlock) -> bool:
    norms = (part.norm2, part.ffn_norm1, part.ffn_norm2, part.attn.norm_q, part.attn.norm_k)
    if part.modulation:
        first_is_plain = checks.carries(part.norm1, lumina.rms_norm_zero)
        norms = (*norms, part.norm1.norm)
    else:
        first_is_plain = True
        norms = (*norms, part.norm1)
    return (
        first_is_plain
        and checks.plain(RMSNorm, *norms)
        and checks.bare(part.attn)
        and type(part.attn.processor) is Lumina2Attention
    )


def _attend(
    part: Lumina2TransformerBlock, normed: Tensor, mask: Tensor | None, rope: Tensor | Rope
) -> Tensor:
    return part.attn.processor(part.attn, normed, normed, mask, rope)


def _chain(
    blocks: Sequence[Lumina2TransformerBlock],
    hidden: Tensor,
    mask: Tensor | None,
    rope: Tensor | Rope,
    temb: Tensor,
) -> Tensor:
    return lumina.chain(
        blocks, hidden, temb, lambda part, normed: _attend(part, normed, mask, rope)
    )


def transformer(
    self: Lumina2Transformer2DModel,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    attention_kwargs: dict[str, object] | None = None,
    return_dict: bool = True,
) -> tuple[Tensor, ...] | Transformer2DModelOutput:
    """The forward of `Lumina2Transformer2DModel`."""
    mask = encoder_attention_mask
    if (
        attention_kwargs
        or (self.gradient_checkpointing and torch.is_grad_enabled())
        or not is_token_mask(mask, encoder_hidden_states)
        or not _is_plain(self)
    ):
        return type(self).forward(
            self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask,
            attention_kwargs=attention_kwargs, return_dict=return_dict,
        )  # fmt: skip
    patch = self.config.patch_size
    grid = tuple(side // patch for side in hidden_states.shape[2:])
    temb, caption = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    image, *ropes, lengths, totals = self.rope_embedder(hidden_states, mask)
    caption_rope, image_rope, joint_rope = map(lumina.rope_tables, ropes)
    image = self.x_embedder(image)
    for part in self.context_refiner:
        caption = part(caption, mask, caption_rope)
    image = _chain(self.noise_refiner, image, None, image_rope, temb)

    pairs = zip(caption, lengths, image, strict=True)
    joint = [torch.cat([words[:count].to(rows.dtype), rows]) for words, count, rows in pairs]
    hidden = pad_sequence(joint, batch_first=True)
    keys = torch.tensor(totals, device=hidden.device) if len(set(totals)) > 1 else None
    hidden = _chain(self.layers, hidden, keys, joint_rope, temb)

    ends = zip(hidden, lengths, totals, strict=True)
    image = torch.stack([rows[start:end] for rows, start, end in ends])
    sample = unpatchify(self.norm_out(image, temb), grid, patch)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _is_plain(model: Lumina2Transformer2DModel) -> bool:
    parts = (*model.context_refiner, *model.noise_refiner, *model.layers)
    return all(checks.carries(part, block) and _block_is_plain(part) for part in parts)


def replacements(model: Lumina2Transformer2DModel) -> Iterator[Replacement]:
    """Check `model` and name its parts that run on fused ops."""
    _check_versions()
    embed, rope = model.time_caption_embed, model.rope_embedder
    checks.check_type("time_caption_embed", embed, Lumina2CombinedTimestepCaptionEmbedding)
    checks.check_type("rope_embedder", rope, Lumina2RotaryPosEmbed)
    name = "time_caption_embed.caption_embedder.0"
    yield rms_norm_replacement(name, model.get_submodule(name))
    for blocks, modulated in (
        ("noise_refiner", True),
        ("context_refiner", False),
        ("layers", True),
    ):
        for index, part in enumerate(model.get_submodule(blocks)):
            name = f"{blocks}.{index}"
            checks.check_type(name, part, Lumina2TransformerBlock)
            checks.check_value(f"{name}.modulation", part.modulation, modulated)
            yield from _block_replacements(name, part)
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
        Lumina2Transformer2DModel.forward, "hidden_states", "timestep", "encoder_hidden_states",
        "encoder_attention_mask", "attention_kwargs", "return_dict",
    )  # fmt: skip
    checks.check_parameters(
        Lumina2TransformerBlock.forward, "hidden_states", "attention_mask", "image_rotary_emb",
        "temb",
    )  # fmt: skip
    checks.check_parameters(
        Lumina2AttnProcessor2_0.__call__, "attn", "hidden_states", "encoder_hidden_states",
        "attention_mask", "image_rotary_emb", "base_sequence_length",
    )  # fmt: skip
    checks.check_parameters(Lumina2RotaryPosEmbed.forward, "hidden_states", "attention_mask")
    checks.check_parameters(
        Lumina2CombinedTimestepCaptionEmbedding.forward, "hidden_states", "timestep",
        "encoder_hidden_states",
    )  # fmt: skip


def _block_replacements(name: str, part: Lumina2TransformerBlock) -> Iterator[Replacement]:
    if part.modulation:
        yield lumina.rms_norm_zero_replacement(f"{name}.norm1", part.norm1)
    lumina.check_norms(name, part, part.norm1.norm if part.modulation else part.norm1)
    attn = part.attn
    checks.check_type(f"{name}.attn", attn, Attention)
    checks.check_type(f"{name}.attn.processor", attn.processor, Lumina2AttnProcessor2_0)
    checks.check_linear_layers(f"{name}.attn", attn, *PROJECTIONS)
    lumina.check_head_norms(f"{name}.attn", attn, RMSNorm)
    yield Replacement(
        name=f"{name}.attn", module=attn, attribute="processor", by=Lumina2Attention(),
        ops="qk_norm_rope, dit_attention",
    )  # fmt: skip
    yield lumina.feed_forward_replacement(f"{name}.feed_forward", part.feed_forward)
    yield Replacement(name=name, module=part, by=block, ops="sandwich_residual_norm")


def int8_layers(model: Lumina2Transformer2DModel) -> Iterator[str]:
    """The attention and feed-forward layers of all blocks."""
    for blocks in BLOCKS:
        for index, _ in enumerate(model.get_submodule(blocks)):
            for layer in (*(f"attn.{key}" for key in PROJECTIONS), *lumina.FEED_FORWARD):
                yield f"{blocks}.{index}.{layer}"


def specimen() -> tuple[Lumina2Transformer2DModel, dict[str, object]]:
    """A tiny model with grouped heads, and a call of it."""
    model = Lumina2Transformer2DModel(
        patch_size=2, in_channels=2, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4),
        axes_lens=(8, 8, 8), cap_feat_dim=4,
    )  # fmt: skip
    return randomized(model), {
        "hidden_states": torch.randn(2, 2, 8, 6),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": torch.randn(2, 3, 4),
        "encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "return_dict": False,
    }


RECIPE = Recipe(
    kind=Lumina2Transformer2DModel,
    replacements=replacements,
    int8_layers=int8_layers,
    specimen=specimen,
)
