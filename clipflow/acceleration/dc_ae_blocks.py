"""The blocks of diffusers' DC-AE on fused ops, channels-last from end to end.

Each function stands for the stock forward of one class: the same module, the same arguments, the
same result. Pictures are [B, C, H, W] outside; inside they are [B, H, W, C], which is the same
memory where the tensor lies channels-last, as every result here does.

Source: Chen et al., "Deep Compression Autoencoder" (2024); Cai et al., "EfficientViT" (2023).
"""

# Shape suffixes: B = batch, C = channels, N = H*W tokens, K = channels of a head.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow import ops
from clipflow.acceleration import checks
from clipflow.nn.conv3x3 import conv3x3, repeated_conv3x3


def tokens_last(picture: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C]; a view where it lies channels-last."""
    return picture.permute(0, 2, 3, 1).contiguous()


def channels_first(image: Tensor) -> Tensor:
    """[B, H, W, C] as [B, C, H, W], a channels-last view."""
    return image.permute(0, 3, 1, 2)


def rms_norm(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """diffusers' `RMSNorm` of the channels of [B, H, W, C], plus `residual`."""
    x = x.to(norm.weight.dtype)  # they differ under autocast
    B, C = x.shape[0], x.shape[-1]
    shift = None if norm.bias is None else norm.bias.expand(B, C)
    scale = norm.weight.new_zeros(1).expand(B, C)
    y = ops.adaln_norm(x, shift, scale, weight=norm.weight, norm="rms", eps=norm.eps)
    if residual is None:
        return y
    return residual + y if torch.is_grad_enabled() else y.add_(residual)


def res_block(block: nn.Module, hidden_states: Tensor) -> Tensor:
    """`ResBlock` with RMSNorm: x + norm(conv2(act(conv1(x))))."""
    if not checks.plain(nn.Conv2d, block.conv1, block.conv2):
        return type(block).forward(block, hidden_states)
    x = tokens_last(hidden_states)
    silu = type(block.nonlinearity) is nn.SiLU
    h = conv3x3(x, block.conv1.weight, block.conv1.bias, silu=silu)
    h = conv3x3(h if silu else block.nonlinearity(h), block.conv2.weight, None)
    return channels_first(rms_norm(block.norm, h, x))


def attention(attn: nn.Module, hidden_states: Tensor) -> Tensor:
    """`SanaMultiscaleLinearAttention` with RMSNorm, residual included.

    For 32 tokens and less diffusers computes the same sums in another order.
    """
    x = tokens_last(hidden_states)
    tokens = x.flatten(1, 2)
    qkv = torch.cat([attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)], dim=-1)
    image = channels_first(qkv.unflatten(1, x.shape[1:3]))
    K = attn.attention_head_dim
    heads = [_heads(qkv, K), *(_scaled_heads(scale, image, K) for scale in attn.to_qkv_multiscale)]
    mixed = [ops.linear_attention(q, k, v, eps=attn.eps).flatten(2) for q, k, v in heads]
    y = attn.to_out(torch.cat(mixed, dim=-1)).view_as(x)
    return channels_first(rms_norm(attn.norm_out, y, x if attn.residual_connection else None))


def _heads(qkv: Tensor, K: int) -> tuple[Tensor, ...]:
    """Queries, keys, values [B, N, H, K]: every 3K consecutive channels are one head's."""
    return qkv.unflatten(-1, (-1, 3, K)).unbind(3)


def _scaled_heads(scale: nn.Module, qkv: Tensor, K: int) -> tuple[Tensor, ...]:
    """`_heads` of what `SanaMultiscaleAttentionProjection` makes of the image `qkv` [B, 3HK, ...].

    Its second convolution mixes the K channels of each query, key and value: a matrix product.
    """
    if not checks.plain(nn.Conv2d, scale.proj_out) or checks.hooked(scale):
        return _heads(tokens_last(scale(qkv)).flatten(1, 2), K)
    tokens = tokens_last(scale.proj_in(qkv)).flatten(1, 2)
    weight = scale.proj_out.weight.view(-1, K, K).transpose(1, 2)
    groups = tokens.flatten(0, 1).unflatten(-1, (-1, K)).transpose(0, 1)  # [3H, B*N, K]
    mixed = torch.bmm(groups, weight).unflatten(1, tokens.shape[:2]).unflatten(0, (-1, 3))
    return mixed.permute(2, 3, 0, 1, 4).unbind(3)


def glu_mbconv(block: nn.Module, hidden_states: Tensor) -> Tensor:
    """`GLUMBConv` with RMSNorm, residual included; the 1x1 convolutions are matrix products."""
    inverted, depth, point = block.conv_inverted, block.conv_depth, block.conv_point
    if not checks.plain(nn.Conv2d, inverted, depth, point):
        return type(block).forward(block, hidden_states)
    x = tokens_last(hidden_states)
    y = F.linear(x.flatten(1, 2), inverted.weight.flatten(1), inverted.bias)
    grid = (x.shape[1], x.shape[2])
    y = ops.glu_conv(y.to(depth.weight.dtype), depth.weight, depth.bias, grid, pre_silu=True)
    y = F.linear(y, point.weight.flatten(1)).view_as(x)
    return channels_first(rms_norm(block.norm, y, x if block.residual_connection else None))


def up_block(block: nn.Module, hidden_states: Tensor) -> Tensor:
    """`DCUpBlock2d`: twice the side, and the shortcut that deals channels out to pixels."""
    if not checks.plain(nn.Conv2d, block.conv):
        return type(block).forward(block, hidden_states)
    x = tokens_last(hidden_states)
    if block.interpolate:
        y = repeated_conv3x3(x, block.conv.weight, block.conv.bias)
    else:
        y = _shuffle(conv3x3(x, block.conv.weight, block.conv.bias))
    if block.shortcut:
        y = _add_dealt_out(y, x, block.repeats)
    return channels_first(y)


def _shuffle(x: Tensor) -> Tensor:
    """`pixel_shuffle` by 2: channel 4c + 2i + j goes to row i, column j of channel c."""
    x = x.unflatten(-1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _add_dealt_out(y: Tensor, x: Tensor, repeats: int) -> Tensor:
    """y + shuffle(x, each channel repeated), y [B, 2H, 2W, C'], x [B, H, W, 4C'/repeats]."""
    if 4 % repeats or torch.is_grad_enabled():
        return y + _shuffle(x.repeat_interleave(repeats, dim=-1))
    dealt = x.unflatten(-1, (-1, 4 // repeats))
    corners = y.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H, 2, W, 2, C']
    for corner in range(4):
        corners[:, :, corner // 2, :, corner % 2] += dealt[..., corner // repeats]
    return y


def down_block(block: nn.Module, hidden_states: Tensor) -> Tensor:
    """`DCDownBlock2d`: half the side, and the shortcut that averages pixels into channels."""
    if not checks.plain(nn.Conv2d, block.conv):
        return type(block).forward(block, hidden_states)
    x = tokens_last(hidden_states)
    if block.downsample:
        y = _unshuffle(conv3x3(x, block.conv.weight, block.conv.bias))
    else:
        y = tokens_last(block.conv(channels_first(x)))
    if block.shortcut:
        y = y + _unshuffle(x).unflatten(-1, (-1, block.group_size)).mean(-1)
    return channels_first(y)


def _unshuffle(x: Tensor) -> Tensor:
    """`pixel_unshuffle` by 2: row i, column j of channel c goes to channel 4c + 2i + j."""
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 5, 2, 4)
    return x.flatten(3)


def decoder(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """`Decoder`: latents [B, C, h, w] to pictures [B, 3, H, W], contiguous."""
    x = enter(module, hidden_states)
    for stage in reversed(module.up_blocks):
        # One by one, so that the input of a stage is freed before its end.
        for block in stage if checks.plain(nn.Sequential, stage) else [stage]:
            x = block(x)
    return leave(module, x).contiguous()


def enter(module: nn.Module, latents: Tensor) -> Tensor:
    """The decoder's first convolution, of `latents` [B, C, h, w], with its shortcut."""
    x = module.conv_in(latents)
    if module.in_shortcut:
        x = x + latents.repeat_interleave(module.in_shortcut_repeats, dim=1)
    return x.contiguous(memory_format=torch.channels_last)


def leave(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """What follows the decoder's last block: norm, activation and the convolution to pixels."""
    x = channels_first(rms_norm(module.norm_out, tokens_last(hidden_states)))
    return module.conv_out(module.conv_act(x))


def encoder(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """`Encoder`: pictures [B, 3, H, W] to latents [B, C, h, w], contiguous."""
    x = module.conv_in(hidden_states.contiguous(memory_format=torch.channels_last))
    for stage in module.down_blocks:
        x = stage(x)
    y = module.conv_out(x)
    if module.out_shortcut:
        groups = tokens_last(x).unflatten(-1, (-1, module.out_shortcut_average_group_size))
        y = y + channels_first(groups.mean(-1))
    return y.contiguous()
