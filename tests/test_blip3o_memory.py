"""Estimates of activations against what lives at once in runs of published sizes, on "meta"."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from live_bytes import LiveBytes, most_bytes
from tiny_sdxl import SDXL_UNET, SDXL_VAE, UNET, VAE

from clipflow.models.blip3o.config import VisionConfig
from clipflow.models.blip3o.eva import EVAConfig, EVATower
from clipflow.models.blip3o.memory import (
    eva_activations,
    unet_activations,
    vae_activations,
    vision_activations,
)
from clipflow.models.blip3o.qwen import make_vision, patches_of
from clipflow.models.blip3o.scenes import VISION

# The depth inside a stage changes nothing.
DEEP = {**SDXL_UNET, "transformer_layers_per_block": [1, 1, 1]}
WIDE = {**UNET, "block_out_channels": [64, 96], "layers_per_block": 2}


def assert_close_above(estimate, measured):
    """A little above, so that what is let through fits."""
    assert measured <= estimate <= 1.15 * measured


@pytest.mark.parametrize("config", [EVAConfig(num_hidden_layers=2), EVAConfig(
    image_size=64, patch_size=8, hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=128, pool=2,
)])  # fmt: skip
def test_eva(config):
    with torch.device("meta"):
        tower = EVATower(config).bfloat16()
    size = config.image_size

    def run():
        tower(torch.empty(2, 3, size, size, dtype=torch.bfloat16))

    assert_close_above(eva_activations(config, 2, torch.bfloat16), most_bytes(run))


NARROW = VisionConfig(
    hidden_size=160, depth=2, num_heads=2, intermediate_size=428, patch_size=14,
    temporal_patch_size=2, spatial_merge_size=2, window_size=112, fullatt_block_indexes=(1,),
    image_size=112,
)  # fmt: skip


@pytest.mark.parametrize("config", [VISION, NARROW], ids=["scenes", "an eighth of the published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_vision(config, dtype):
    tower = make_vision(config, 32).to(dtype)
    size = config.image_size
    with LiveBytes() as live:
        pixels = torch.zeros(2, 3, size, size, dtype=dtype)
        patches, grid_thw = patches_of(pixels, config)
        tower(patches, grid_thw=grid_thw)
    assert_close_above(vision_activations(config, 2, dtype), live.most)


@pytest.mark.parametrize(
    ("settings", "rows", "size", "dtype"),
    [
        (DEEP, 2, (128, 128), torch.bfloat16),
        (DEEP, 1, (96, 64), torch.float32),
        (WIDE, 3, (32, 32), torch.float32),
    ],
    ids=["SDXL", "portrait", "small"],
)
def test_unet(settings, rows, size, dtype):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings).to(dtype)
    width, pooled = unet.config.cross_attention_dim, unet.config.cross_attention_dim

    def run():
        added = {"text_embeds": torch.empty(rows, pooled, dtype=dtype)}
        added["time_ids"] = torch.empty(rows, 6)
        tokens = torch.empty(rows, 64, width, dtype=dtype)
        unet(torch.empty(rows, 4, *size, dtype=dtype), torch.empty(()), tokens, None, None, None,
             None, added)  # fmt: skip

    assert_close_above(unet_activations(unet.config, rows, size, dtype), most_bytes(run))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (SDXL_VAE, (128, 128)),
        (SDXL_VAE, (64, 96)),
        ({**VAE, "block_out_channels": [32, 64]}, (32, 32)),
        ({**VAE, "block_out_channels": [64, 64]}, (8, 32)),
    ],
)
def test_vae(settings, size):
    with torch.device("meta"):
        vae = AutoencoderKL(**settings)
    vae.enable_slicing()

    def run():
        vae.decode(torch.empty(2, 4, *size))

    assert_close_above(vae_activations(vae.config, 2, size, torch.float32), most_bytes(run))


def test_tiles_take_less():
    whole = vae_activations(SDXL_VAE, 1, (512, 512), torch.float32)
    tiled = vae_activations(SDXL_VAE, 1, (512, 512), torch.float32, tiling=True)
    at_once = vae_activations(SDXL_VAE, 1, (128, 128), torch.float32)
    assert at_once < tiled < whole / 8
