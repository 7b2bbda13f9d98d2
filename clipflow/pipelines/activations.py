"""Bytes of activations of a model's parts, from their sizes: what lives at once, at most."""

# Shape suffixes: R = rows, L = positions, H = LM width, I = its feed-forward width, C = channels.

from __future__ import annotations

import torch

from clipflow.models.dc_ae.memory import (
    DECODE_BUDGET,
    WORK_BYTES,
    choose_parts,
    decode_bytes,
)
from clipflow.models.unilip.config import DecoderConfig, TextConfig, VisionConfig
from clipflow.nn.conv3x3 import BAND_TILES, LEAST, LEAST_REPEATED, SIDE


def language_activations(config: TextConfig, rows: int, positions: int, dtype: torch.dtype) -> int:
    """Of the language model and the connector on prompts [R, L].

    Seven tensors of the LM's width from the embeddings to the residual stream of the connector, and
    the larger of attention (its norm, queries, keys and values before and after rotation, its
    result) and the feed-forward part (its norm and three tensors of its width).
    """
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    keys = H // config.num_attention_heads * config.num_key_value_heads
    attention = H + 2 * (H + 2 * keys) + H
    return rows * positions * (7 * H + max(attention, H + 3 * I)) * dtype.itemsize


def vision_activations(config: VisionConfig, pictures: int, dtype: torch.dtype) -> int:
    """Of the vision tower: four tensors of its width and three of its feed-forward width."""
    C, I = config.hidden_size, config.intermediate_size  # noqa: E741
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    pixels = 3 * config.image_size**2
    return pictures * (tokens * (4 * C + 3 * I) + pixels) * dtype.itemsize


def decode_activations(
    config: DecoderConfig, shape: tuple[int, int, int], device: torch.device
) -> int:
    """Of the decoder on latents of `shape` = (B, h, w), in the parts it goes in, with pictures.

    Pictures are float32 and held four times while they are brought into range. Of the bound that
    `decode_bytes` has for work space, what bands of convolutions take on a CPU is counted.
    """
    B, h, w = shape
    rows, tile_size = choose_parts(config, shape, torch.float32, DECODE_BUDGET)
    pictures = B * 3 * h * w * config.upscale**2 * torch.float32.itemsize
    drawing = decode_bytes(config, h, w, min(rows, B), tile_size=tile_size) - WORK_BYTES
    drawing += _band_bytes(config, w) if device.type == "cpu" else 0
    return max(drawing + (pictures if rows < B else 0), 4 * pictures)


def _band_bytes(config: DecoderConfig, width: int) -> int:
    """Of `clipflow.nn.conv3x3` on a band of rows: factors and products, and halves of both."""
    most = 0
    for index, C in enumerate(config.block_out_channels):
        side = width * (config.upscale >> index)
        most = max(most, max(BAND_TILES, side // SIDE) * (48 + 76) * C)
    return most * torch.float32.itemsize


def decoder_kernels(config: DecoderConfig, shape: tuple[int, int, int]) -> int:
    """Of the transformed weights that `clipflow.nn.conv3x3` keeps once latents of `shape` came.

    36 factors for 9 taps of each kernel of the residual blocks, 9 of each that enlarges.
    """
    _, h, w = shape
    total = 0
    channels = config.block_out_channels
    for index, (C, layers) in enumerate(zip(channels, config.layers_per_block, strict=True)):
        scale = config.upscale >> index
        pixels = h * w * scale**2
        residual = config.block_types[index] == "ResBlock"
        if residual and C >= LEAST[0] and pixels >= LEAST[1] and not (h * scale | w * scale) % 4:
            total += 36 * 2 * layers * C * C
        if index + 1 < len(channels):
            before = channels[index + 1]
            if min(C, before) >= LEAST_REPEATED[0] and pixels // 4 >= LEAST_REPEATED[1]:
                total += 9 * C * before
    return total * torch.float32.itemsize
