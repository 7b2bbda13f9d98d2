"""`SanaTransformer2DModel` of diffusers on fused ops.

The transformer's own forward fuses each block's last sum with the next block's norm and turns the
caption mask into key lengths. Whatever that cannot serve goes through diffusers' forward, whose
blocks are then accelerated one by one.
"""

# Shape suffixes: B = batch, N = h*w image tokens, L = condition tokens, D = channels.

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.embeddings import PatchEmbed, PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.models.transformers.sana_transformer import (
    GLUMBConv,
    SanaAttnProcessor2_0,
    SanaCombinedTimestepGuidanceEmbeddings,
    SanaModulatedNorm,
    SanaTransformer2DModel,
    SanaTransformerBlock,
)
from torch import Tensor, nn

from clipflow import ops
from clipflow.acceleration import checks
from clipflow.acceleration.conditions import is_token_mask, real_tokens
from clipflow.acceleration.int8 import is_pointwise, pointwise
from clipflow.acceleration.norms import rms_norm_replacement
from clipflow.acceleration.patches import unpatchify
from clipflow.acceleration.replace import Recipe, Replacement
from clipflow.acceleration.specimens import randomized

LARGEST_HALF = 65504
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class SanaSelfAttention:
    """Attention processor: ReLU linear attention."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As `SanaLinearAttnProcessor2_0`, which does not read the mask either."""
        if encoder_hidden_states is not None:
            return SanaLinearAttnProcessor2_0()(
                attn, hidden_states, encoder_hidden_states, attention_mask
            )
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        mixed = ops.linear_attention(*(t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v)))
        mixed = attn.to_out[1](attn.to_out[0](mixed.flatten(2)))
        if hidden_states.dtype is torch.float16:
            return mixed.clip(-LARGEST_HALF, LARGEST_HALF)
        return mixed


class SanaCrossAttention:
    """Attention processor: softmax attention to the first key_lengths[b] condition tokens."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As `SanaAttnProcessor2_0`; `attention_mask` [B] integers are key lengths."""
        if attention_mask is not None and attention_mask.ndim != 1:
            return SanaAttnProcessor2_0()(
                attn, hidden_states, encoder_hidden_states, attention_mask
            )
        condition = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(condition), attn.to_v(condition)
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))
        mixed = ops.dit_attention(q, k, v, key_lengths=attention_mask)
        return attn.to_out[1](attn.to_out[0](mixed.flatten(2)))


def mix_ffn(self: GLUMBConv, hidden_states: Tensor) -> Tensor:
    """The forward of `GLUMBConv`: [B, D, h, w] to [B, D, h, w], channels-last."""
    if not _ffn_is_plain(self):
        return type(self).forward(self, hidden_states)
    grid = (hidden_states.shape[2], hidden_states.shape[3])
    tokens = hidden_states.permute(0, 2, 3, 1).flatten(1, 2)
    return _mix_tokens(self, tokens, grid).unflatten(1, grid).permute(0, 3, 1, 2)


def _ffn_is_plain(ff: GLUMBConv) -> bool:
    return checks.plain(nn.Conv2d, ff.conv_depth) and all(
        map(is_pointwise, (ff.conv_inverted, ff.conv_point))
    )


def _mix_tokens(ff: GLUMBConv, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    x, depth = pointwise(ff.conv_inverted, tokens), ff.conv_depth
    x = ops.glu_conv(x, depth.weight.to(x.dtype), depth.bias.to(x.dtype), grid, pre_silu=True)
    return pointwise(ff.conv_point, x)


def block(
    self: SanaTransformerBlock,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """The forward of `SanaTransformerBlock`, for whoever calls a block alone."""
    if not _block_is_plain(self):
        return type(self).forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, height, width,
        )  # fmt: skip
    hidden, modulation = _stream(hidden_states, timestep, self.scale_shift_table)
    normed = ops.adaln_norm(
        hidden, modulation[:, 0], modulation[:, 1],
        table=self.scale_shift_table[:2], eps=self.norm1.eps,
    )  # fmt: skip
    hidden, branch = _branches(
        self, hidden, normed, modulation, encoder_hidden_states, encoder_attention_mask,
        (height, width),
    )  # fmt: skip
    return torch.addcmul(hidden, _gate(self, modulation, 5), branch)


def _block_is_plain(part: SanaTransformerBlock) -> bool:
    return (
        type(part.attn1.processor) is SanaSelfAttention
        and type(part.attn2.processor) is SanaCrossAttention
        and checks.bare(part.attn1, part.attn2)
        and checks.plain(nn.LayerNorm, part.norm1, part.norm2)
        and checks.carries(part.ff, mix_ffn)
        and _ffn_is_plain(part.ff)
    )


def _stream(hidden: Tensor, timestep: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream and the modulation [B, 6, D] in one dtype; they differ in autocast."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, table.dtype))
    return hidden, timestep.reshape(hidden.shape[0], 6, -1).to(hidden.dtype)


def _gate(block: SanaTransformerBlock, modulation: Tensor, row: int) -> Tensor:
    return (block.scale_shift_table[row] + modulation[:, row])[:, None]


def _branches(
    block: SanaTransformerBlock,
    hidden: Tensor,
    normed: Tensor,
    modulation: Tensor,
    condition: Tensor,
    mask: Tensor | None,
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """(the stream before the feed-forward branch is added, that branch), both [B, N, D]."""
    dtype, attn1, attn2 = hidden.dtype, block.attn1, block.attn2
    mixed = attn1.processor(attn1, normed).to(dtype)
    hidden = torch.addcmul(hidden, _gate(block, modulation, 2), mixed)
    hidden, normed = ops.gated_residual_norm(
        hidden, attn2.processor(attn2, hidden, condition, mask).to(dtype), None,
        modulation[:, 3], modulation[:, 4],
        table=block.scale_shift_table[3:5], eps=block.norm2.eps,
    )  # fmt: skip
    return hidden, _mix_tokens(block.ff, normed, grid).to(dtype)


def norm_out(
    self: SanaModulatedNorm, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor
) -> Tensor:
    """The forward of `SanaModulatedNorm`."""
    table = scale_shift_table
    if not checks.plain(nn.LayerNorm, self.norm) or hidden_states.dtype is not table.dtype:
        return type(self).forward(self, hidden_states, temb, table)
    temb = temb.to(hidden_states)
    return ops.adaln_norm(hidden_states, temb, temb, table=table, eps=self.norm.eps)


def transformer(
    self: SanaTransformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    guidance: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    attention_kwargs: dict[str, object] | None = None,
    controlnet_block_samples: tuple[Tensor, ...] | None = None,
    return_dict: bool = True,
) -> tuple[Tensor, ...] | Transformer2DModelOutput:
    """The forward of `SanaTransformer2DModel`; `attention_mask` has no meaning there either."""
    condition, mask = encoder_hidden_states, encoder_attention_mask
    if (
        attention_kwargs
        or (self.gradient_checkpointing and torch.is_grad_enabled())
        or (mask is not None and not is_token_mask(mask, condition))
        or not _is_plain(self)
    ):
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, timestep, guidance,
            encoder_attention_mask, attention_mask, attention_kwargs=attention_kwargs,
            controlnet_block_samples=controlnet_block_samples, return_dict=return_dict,
        )  # fmt: skip
    patch = self.config.patch_size
    batch, grid = hidden_states.shape[0], [side // patch for side in hidden_states.shape[2:]]
    hidden = self.patch_embed(hidden_states)
    options = {"batch_size": batch} if guidance is None else {"guidance": guidance}
    modulation, embedding = self.time_embed(timestep, hidden_dtype=hidden.dtype, **options)
    if mask is not None:
        condition, mask = real_tokens(condition, mask)
    condition = self.caption_projection(condition).view(batch, -1, hidden.shape[-1])
    condition = self.caption_norm(condition)
    hidden, modulation = _stream(hidden, modulation, self.scale_shift_table)
    normed = _blocks(
        self, hidden, modulation, embedding.to(hidden.dtype), condition, mask, tuple(grid),
        controlnet_block_samples or (),
    )  # fmt: skip
    sample = unpatchify(self.proj_out(normed), tuple(grid), patch)
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _is_plain(model: SanaTransformer2DModel) -> bool:
    return (
        all(_block_is_plain(part) for part in model.transformer_blocks)
        and all(checks.carries(part, block) for part in model.transformer_blocks)
        and checks.carries(model.norm_out, norm_out)
        and checks.plain(nn.LayerNorm, model.norm_out.norm)
    )


def _blocks(
    model: SanaTransformer2DModel,
    hidden: Tensor,
    modulation: Tensor,
    embedding: Tensor,
    condition: Tensor,
    lengths: Tensor | None,
    grid: tuple[int, int],
    controls: tuple[Tensor, ...],
) -> Tensor:
    """All blocks and the modulated norm of the output, [B, N, D]."""
    blocks = model.transformer_blocks
    shift, scale = modulation[:, 0], modulation[:, 1]
    # What modulates the norm after each block: the next block's, at last the output's.
    after = [(shift, scale, block.scale_shift_table[:2], block.norm1.eps) for block in blocks]
    after.append((embedding, embedding, model.scale_shift_table, model.norm_out.norm.eps))
    shift, scale, table, eps = after[0]
    normed = ops.adaln_norm(hidden, shift, scale, table=table, eps=eps)
    for index, block in enumerate(blocks):
        hidden, branch = _branches(block, hidden, normed, modulation, condition, lengths, grid)
        shift, scale, table, eps = after[index + 1]
        if 0 < index <= len(controls):
            hidden = torch.addcmul(hidden, _gate(block, modulation, 5), branch)
            hidden, normed = ops.gated_residual_norm(
                hidden, controls[index - 1].to(hidden.dtype).expand_as(hidden), None, shift, scale,
                table=table, eps=eps,
            )  # fmt: skip
        else:
            hidden, normed = ops.gated_residual_norm(
                hidden, branch, modulation[:, 5], shift, scale,
                gate_table=block.scale_shift_table[5], table=table, eps=eps,
            )  # fmt: skip
    return normed


def replacements(model: SanaTransformer2DModel) -> Iterator[Replacement]:
    """Check `model` and name its parts that run on fused ops."""
    _check_versions()
    time_embed = type(model.time_embed)
    if time_embed not in (AdaLayerNormSingle, SanaCombinedTimestepGuidanceEmbeddings):
        checks.check_type("time_embed", model.time_embed, AdaLayerNormSingle)
    checks.check_type("patch_embed", model.patch_embed, PatchEmbed)
    checks.check_type("caption_projection", model.caption_projection, PixArtAlphaTextProjection)
    checks.check_type("norm_out", model.norm_out, SanaModulatedNorm)
    checks.check_plain_layer_norm("norm_out.norm", model.norm_out.norm)
    for index, part in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{index}"
        yield from _block_replacements(name, part)
    yield rms_norm_replacement("caption_norm", model.caption_norm)
    yield Replacement(name="norm_out", module=model.norm_out, by=norm_out, ops="adaln_norm")
    yield Replacement(
        name="",
        module=model,
        by=transformer,
        ops="gated_residual_norm across blocks, key lengths for masks",
    )


def _check_versions() -> None:
    """Raise where diffusers calls its parts otherwise than this file expects."""
    checks.check_parameters(
        SanaTransformer2DModel.forward, "hidden_states", "encoder_hidden_states", "timestep",
        "guidance", "encoder_attention_mask", "attention_mask", "attention_kwargs",
        "controlnet_block_samples", "return_dict",
    )  # fmt: skip
    checks.check_parameters(
        SanaTransformerBlock.forward, "hidden_states", "attention_mask", "encoder_hidden_states",
        "encoder_attention_mask", "timestep", "height", "width",
    )  # fmt: skip
    checks.check_parameters(GLUMBConv.forward, "hidden_states")
    checks.check_parameters(SanaModulatedNorm.forward, "hidden_states", "temb", "scale_shift_table")
    for processor in (SanaLinearAttnProcessor2_0, SanaAttnProcessor2_0):
        checks.check_parameters(
            processor.__call__, "attn", "hidden_states", "encoder_hidden_states", "attention_mask"
        )


def _block_replacements(name: str, part: SanaTransformerBlock) -> Iterator[Replacement]:
    checks.check_type(name, part, SanaTransformerBlock)
    for norm in ("norm1", "norm2"):
        checks.check_plain_layer_norm(f"{name}.{norm}", getattr(part, norm, None))
    for attn, stock in (("attn1", SanaLinearAttnProcessor2_0), ("attn2", SanaAttnProcessor2_0)):
        _check_attention(f"{name}.{attn}", getattr(part, attn, None), stock)
    checks.check_type(f"{name}.ff", part.ff, GLUMBConv)
    checks.check_value(f"{name}.ff.norm_type", part.ff.norm_type, None)
    checks.check_value(f"{name}.ff.residual_connection", part.ff.residual_connection, False)
    yield Replacement(
        name=f"{name}.attn1", module=part.attn1, attribute="processor",
        by=SanaSelfAttention(), ops="linear_attention",
    )  # fmt: skip
    yield Replacement(
        name=f"{name}.attn2", module=part.attn2, attribute="processor",
        by=SanaCrossAttention(), ops="dit_attention",
    )  # fmt: skip
    for attn, norm in product(("attn1", "attn2"), ("norm_q", "norm_k")):
        if (layer := getattr(part.get_submodule(attn), norm)) is not None:
            yield rms_norm_replacement(f"{name}.{attn}.{norm}", layer)
    yield Replacement(name=f"{name}.ff", module=part.ff, by=mix_ffn, ops="glu_conv")
    yield Replacement(name=name, module=part, by=block, ops="adaln_norm, gated_residual_norm")


def _check_attention(name: str, attn: nn.Module | None, stock: type) -> None:
    checks.check_type(name, attn, Attention)
    checks.check_type(f"{name}.processor", attn.processor, stock)
    checks.check_value(f"{name}.rescale_output_factor", attn.rescale_output_factor, 1.0)
    checks.check_linear_layers(name, attn, *PROJECTIONS)


def int8_layers(model: SanaTransformer2DModel) -> Iterator[str]:
    """The linear layers of all blocks."""
    projections = [f"{attn}.{key}" for attn, key in product(("attn1", "attn2"), PROJECTIONS)]
    for index in range(len(model.transformer_blocks)):
        for layer in (*projections, "ff.conv_inverted", "ff.conv_point"):
            yield f"transformer_blocks.{index}.{layer}"


def specimen() -> tuple[SanaTransformer2DModel, dict[str, object]]:
    """A tiny model of every option that is accelerated, and a call of it."""
    model = SanaTransformer2DModel(
        in_channels=2, out_channels=2, num_layers=2, sample_size=4, qk_norm="rms_norm_across_heads",
        num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2, patch_size=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=4,
    )  # fmt: skip
    return randomized(model), {
        "hidden_states": torch.randn(2, 2, 8, 6),
        "encoder_hidden_states": torch.randn(2, 3, 4),
        "timestep": torch.tensor([700, 30]),
        "encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "controlnet_block_samples": (torch.randn(2, 12, 16),),
        "return_dict": False,
    }


RECIPE = Recipe(
    kind=SanaTransformer2DModel,
    replacements=replacements,
    int8_layers=int8_layers,
    specimen=specimen,
)
