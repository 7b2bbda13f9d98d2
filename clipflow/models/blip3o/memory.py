"""Bytes of activations of BLIP3-o's towers and its SDXL decoder, from sizes; without gradients.

Each is what lives at once where most does, within a few percent above; libraries' work space and
weights come on top. Settings are those of the networks' `config`.
"""

# Shape suffixes: R = rows, B = pictures, D = width, C = channels, h, w = the latent grid.

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from clipflow.models.blip3o.config import VisionConfig
from clipflow.models.blip3o.eva import EVAConfig

# Of an attention block of width C: its feed-forward part's gate, value and product, 4 C each with
# the projection of both, and six of the residual stream, its norms and the block's input.
_ATTENTIVE = 22
# Of a residual block on one input: it, its norm, and the activation of that.
_RESIDUAL = 3
# Bytes at most of a patch's place in Qwen2.5-VL's windows and rotary tables.
_PLACE = 32


def vision_activations(config: VisionConfig, pictures: int, dtype: torch.dtype) -> int:
    """Of Qwen2.5-VL's vision transformer on `pictures` of `image_size`.

    Pixels, patches, and the larger of attention, whose queries and keys turn in float32, and the
    feed-forward part's three wide tensors beside as many of the residual stream's width.
    """
    D, wide, P = config.hidden_size, config.intermediate_size, config.patch_size
    angles = 2 * D // config.num_heads
    attention = 3 * D * dtype.itemsize + (7 * D + angles) * torch.float32.itemsize
    forward = 3 * (D + wide) * dtype.itemsize + angles * torch.float32.itemsize
    patch = 3 * P**2 * (config.temporal_patch_size + 1) * dtype.itemsize
    patches = pictures * (config.image_size // P) ** 2
    return patches * (patch + max(attention, forward) + _PLACE)


def eva_activations(config: EVAConfig, pictures: int, dtype: torch.dtype) -> int:
    """Of `EVATower` on `pictures`: three residual streams, and the MLP's two wide tensors or what
    attention holds."""
    D, wide = config.hidden_size, config.intermediate_size
    tokens = config.grid_side**2 + 1
    most = 3 * D + max(2 * wide, 5 * D)
    return pictures * (tokens * most + 3 * config.image_size**2) * dtype.itemsize


def unet_activations(
    config: Mapping[str, object], rows: int, size: tuple[int, int], dtype: torch.dtype
) -> int:
    """Of the UNet on latents [R, C, h, w]: all that waits for the way up, and the largest block.

    Args:
        config: of the UNet.
        rows: R, twice the pictures with guidance.
        size: (h, w).
        dtype: of the UNet.
    """
    channels = list(config["block_out_channels"])
    layers = _each(config["layers_per_block"], len(channels))
    kinds = [
        "CrossAttn" in down or "CrossAttn" in up
        for down, up in zip(
            config["down_block_types"], reversed(config["up_block_types"]), strict=True
        )
    ]
    waiting, most = float(channels[0]), 0.0
    for index, C in enumerate(channels):
        area = 0.25**index
        below = channels[min(index + 1, len(channels) - 1)]
        waiting += layers[index] * C * area
        if index + 1 < len(channels):
            waiting += C * area / 4
        # On the way up the block's input is what comes from below beside what waited.
        most = max(most, (_RESIDUAL * (below + C) + below) * area)
        if kinds[index]:
            most = max(most, _ATTENTIVE * C * area)
    return int(rows * size[0] * size[1] * (waiting + most) * dtype.itemsize)


def vae_activations(
    config: Mapping[str, object],
    pictures: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    tiling: bool = False,
) -> int:
    """Of the VAE's decoder, which draws pictures one by one, with the pictures twice.

    Args:
        config: of the VAE.
        pictures: B.
        size: (h, w) of the latents.
        dtype: of the VAE.
        tiling: whether it draws tiles of the size that it was trained with.
    """
    channels = list(config["block_out_channels"])
    scale = 2 ** (len(channels) - 1)
    h, w = size
    side = config["sample_size"] // scale if tiling else max(h, w)
    most = 0.0
    for index, C in enumerate(channels):
        below = channels[min(index + 1, len(channels) - 1)]
        # A stage's first block works on what comes from below, which waits while the last adds up.
        most = max(most, max(_RESIDUAL * below, below + 4 * C) * (scale >> index) ** 2)
    drawing = min(h, side) * min(w, side) * most
    return int((drawing + 2 * pictures * 3 * h * w * scale**2) * dtype.itemsize)


def _each(value: int | Sequence[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)
