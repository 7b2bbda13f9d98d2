"""How many bytes the decoder's activations take, and how `PixelDecoder` keeps within a budget."""

# Shape suffixes: B = batch, h, w = sides of the latent grid, C = channels of a stage.

from __future__ import annotations

from collections.abc import Iterator

import torch

from clipflow.models.dc_ae.config import DecoderConfig

DECODE_BUDGET = 1 << 30  # bytes of activations that `PixelDecoder.decode` keeps within

# Tensors of [B, H, W, C] that live at once, in units of one of them: residual block (input, two
# convolutions); attention block (input, 8 + 4 of its feed-forward part); the way out.
_RESIDUAL, _ATTENTIVE, _OUT = 3, 13, 3
# The convolutions' work space, and what the C library keeps of freed tensors (measured on Linux).
WORK_BYTES = 256 << 20


def decode_bytes(
    config: DecoderConfig,
    latent_h: int,
    latent_w: int,
    batch: int = 1,
    *,
    tile_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Peak bytes of activations while `batch` latents become pictures, without a gradient.

    The largest of all stages: 13 tensors in an attention block, 3 in a residual block, and in front
    of each stage the enlarged input with the output; the pictures and `WORK_BYTES` on top. Weights
    are not counted, nor the transformed kernels that `clipflow.nn.conv3x3` keeps on CPUs: four
    times the bytes of the residual blocks' 3x3 kernels, once those in front of the stages.

    Args:
        config: of the decoder.
        latent_h: rows of the latents.
        latent_w: columns of the latents.
        batch: pictures decoded at once.
        tile_size: side of the tiles in pixels; None for whole pictures.
        dtype: of the decoder.
    """
    size = torch.empty((), dtype=dtype).element_size()
    pictures = 3 * config.upscale**2 * latent_h * latent_w
    whole, tiled = 0, 0
    for index, stage in _stages(config):
        scale = config.upscale >> index
        h, w = latent_h * scale, latent_w * scale
        if tile_size is None or index >= _last_attentive(config):
            whole = max(whole, h * w * stage)
            continue
        side = (tile_size >> index) + 2 * _ring(config, index)
        tiled = max(tiled, min(h, side) * min(w, side) * stage)
    if tile_size is not None:
        cut = _last_attentive(config)
        scale = config.upscale >> cut
        tiled += latent_h * latent_w * scale**2 * config.block_out_channels[cut]
    return batch * size * (max(whole, tiled) + 2 * pictures) + WORK_BYTES


def _stages(config: DecoderConfig) -> Iterator[tuple[int, int]]:
    """(index, values per pixel of its resolution) of every stage; 0 is the largest picture."""
    channels = config.block_out_channels
    for index, kind in enumerate(config.block_types):
        C = channels[index]
        most = C * (_ATTENTIVE if kind == "EfficientViTBlock" else _RESIDUAL)
        if index + 1 < len(channels):
            before = channels[index + 1]
            most = max(most, before // 4 + before + C)
        yield index, most + (C * (_OUT - _RESIDUAL) if index == 0 else 0)


def _ring(config: DecoderConfig, index: int) -> int:
    """Pixels around a tile in front of stage `index`'s blocks, regions ending on multiples of 4."""
    ring = 1
    for layers in config.layers_per_block[:index]:
        ring = -(-(ring + 2 * layers + 1) // 2)
    return ring + 2 * config.layers_per_block[index] + 4


def _last_attentive(config: DecoderConfig) -> int:
    """Index of the attention stage with the largest picture; of the smallest where none has it."""
    kinds = config.block_types
    return next((i for i, k in enumerate(kinds) if k == "EfficientViTBlock"), len(kinds) - 1)


def choose_parts(
    config: DecoderConfig, shape: tuple[int, int, int], dtype: torch.dtype, budget: int
) -> tuple[int, int | None]:
    """(pictures at a time, tile size or None) that keep `shape` = (B, h, w) within `budget` bytes.

    Whole pictures as long as one fits; else single pictures in the largest tiles that do, halving
    from the picture's side down to `upscale` pixels for each of 4 latent cells. Where not even
    these fit, because of the attention stages, the largest tiles that take no more than these.
    """
    B, h, w = shape
    one = decode_bytes(config, h, w, dtype=dtype) - WORK_BYTES
    room = budget - WORK_BYTES
    if one <= room:
        return max(1, min(B, room // max(one, 1))), None
    tile, least = config.upscale * max(h, w), 4 * config.upscale
    limit = max(budget, decode_bytes(config, h, w, tile_size=least, dtype=dtype))
    while tile > least and decode_bytes(config, h, w, tile_size=tile, dtype=dtype) > limit:
        tile //= 2
    return 1, max(tile, least)
