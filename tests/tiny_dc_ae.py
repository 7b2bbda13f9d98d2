"""Small DC-AE modules of diffusers with random weights, and their error against float64."""

import copy

import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import Decoder, Encoder
from torch import Tensor, nn

from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.unilip.pixel_decoder import PixelDecoder

BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock")
SCALES = ((), (), (5,))
CHANNELS = (128, 128, 256)
CONFIG = DecoderConfig(
    latent_channels=8, attention_head_dim=32, block_types=BLOCKS, block_out_channels=CHANNELS,
    layers_per_block=(2, 1, 1), qkv_multiscales=SCALES,
)  # fmt: skip


def decoder(**changed: object) -> Decoder:
    """Three stages, 4 times the side; wide enough for every form of the convolutions."""
    sizes = {
        "in_channels": 3, "latent_channels": 8, "block_type": BLOCKS,
        "block_out_channels": CHANNELS, "layers_per_block": (2, 1, 1), "qkv_multiscales": SCALES,
        "upsample_block_type": "interpolate",
    }  # fmt: skip
    return randomized(Decoder(**sizes | changed))


def encoder(**changed: object) -> Encoder:
    sizes = {
        "in_channels": 3, "latent_channels": 8, "block_type": BLOCKS,
        "block_out_channels": (32, 64, 64), "layers_per_block": (1, 1, 1),
        "qkv_multiscales": SCALES,
    }  # fmt: skip
    return randomized(Encoder(**sizes | changed))


def autoencoder() -> AutoencoderDC:
    return randomized(
        AutoencoderDC(
            latent_channels=8,
            **{
                f"{side}_{name}": value
                for side in ("encoder", "decoder")
                for name, value in {
                    "block_types": BLOCKS, "block_out_channels": (32, 64, 64),
                    "layers_per_block": (1, 1, 1), "qkv_multiscales": SCALES,
                }.items()
            },
        )
    )  # fmt: skip


def pixel_decoder(config: DecoderConfig = CONFIG) -> PixelDecoder:
    return randomized(PixelDecoder(config, 64))


def randomized(module: nn.Module) -> nn.Module:
    """`module` for inference, with norms that are not the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            center = float("norm" in name and name.endswith("weight"))
            nn.init.normal_(parameter, center, 0.2, generator=generator)
        else:
            std = parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, 0.0, std, generator=generator)
    return module.eval()


@torch.no_grad()
def errors(stock: nn.Module, fused: nn.Module, x: Tensor) -> tuple[float, float]:
    """Distance of both from `stock` in float64, relative to that."""
    truth = copy.deepcopy(stock).double()(x.double())
    return tuple(float((m(x).double() - truth).norm() / truth.norm()) for m in (stock, fused))
