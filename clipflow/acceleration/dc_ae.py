"""`AutoencoderDC` of diffusers, or its `Decoder` or `Encoder` alone, on fused ops.

Every block is replaced where it lies; the two ends keep the picture channels-last between them.
Residual blocks with batch normalization, as in the checkpoints trained on ImageNet, stay stock.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from diffusers.models.attention_processor import (
    SanaMultiscaleAttnProcessor2_0,
    SanaMultiscaleLinearAttention,
)
from diffusers.models.autoencoders import autoencoder_dc as stock
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import nn

from clipflow.acceleration import checks, dc_ae_blocks
from clipflow.acceleration.replace import Recipe, Replacement
from clipflow.acceleration.specimens import randomized

_OPS = {
    stock.ResBlock: (dc_ae_blocks.res_block, "conv3x3, adaln_norm"),
    SanaMultiscaleLinearAttention: (dc_ae_blocks.attention, "linear_attention, adaln_norm"),
    GLUMBConv: (dc_ae_blocks.glu_mbconv, "glu_conv, adaln_norm"),
    stock.DCUpBlock2d: (dc_ae_blocks.up_block, "conv3x3"),
    stock.DCDownBlock2d: (dc_ae_blocks.down_block, "conv3x3"),
    stock.Decoder: (dc_ae_blocks.decoder, "adaln_norm"),
    stock.Encoder: (dc_ae_blocks.encoder, "channels-last"),
}


def replacements(module: nn.Module) -> Iterator[Replacement]:
    """Every part of `module` that the ops serve.

    Raises:
        AccelerationError: a part is not as diffusers builds it.
    """
    for kind in _OPS:
        checks.check_parameters(kind.forward, "hidden_states")
    for name, part in module.named_modules():
        if type(part) in _OPS and _served(name, part):
            by, ops = _OPS[type(part)]
            yield Replacement(name=name, module=part, by=by, ops=ops)


def _served(name: str, part: nn.Module) -> bool:
    """Whether the ops serve `part`; raises where it is no part of a DC-AE."""
    if isinstance(part, stock.ResBlock):
        if part.norm_type == "rms_norm":
            checks.check_type(f"{name}.norm", part.norm, RMSNorm)
        return part.norm_type == "rms_norm"
    if isinstance(part, SanaMultiscaleLinearAttention):
        checks.check_type(f"{name}.processor", part.processor, SanaMultiscaleAttnProcessor2_0)
        checks.check_type(f"{name}.nonlinearity", part.nonlinearity, nn.ReLU)
        return part.norm_type == "rms_norm"
    if isinstance(part, GLUMBConv):
        checks.check_type(f"{name}.nonlinearity", part.nonlinearity, nn.SiLU)
        return part.norm_type == "rms_norm"
    if isinstance(part, stock.DCUpBlock2d):
        checks.check_value(f"{name}.interpolation_mode", part.interpolation_mode, "nearest")
    if isinstance(part, stock.Decoder):
        checks.check_type(f"{name}.norm_out", part.norm_out, RMSNorm)
    return True


_SIZES = {
    "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1),
    "qkv_multiscales": ((), (), (3,)),
}


def specimen() -> tuple[stock.AutoencoderDC, dict[str, object]]:
    """A tiny model of every block, both ways of changing the side, and a call of it."""
    sides = ("encoder", "decoder")
    model = stock.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        upsample_block_type="interpolate",
        **{f"{side}_{name}": size for side in sides for name, size in _SIZES.items()},
    )
    return randomized(model), {"sample": torch.randn(1, 3, 24, 32), "return_dict": False}


def specimen_of(part: str) -> tuple[nn.Module, dict[str, object]]:
    """The "encoder" or "decoder" of `specimen`, and a call of it."""
    shape = (1, 3, 24, 32) if part == "encoder" else (1, 4, 6, 8)
    return getattr(specimen()[0], part), {"hidden_states": torch.randn(shape)}


AUTOENCODER = Recipe(kind=stock.AutoencoderDC, replacements=replacements, specimen=specimen)
DECODER = Recipe(
    kind=stock.Decoder, replacements=replacements, specimen=partial(specimen_of, "decoder")
)
ENCODER = Recipe(
    kind=stock.Encoder, replacements=replacements, specimen=partial(specimen_of, "encoder")
)
