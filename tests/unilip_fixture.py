"""The recorded outputs of the reference on a tiny random UniLIP, and the model they belong to.

A fixture folder holds config.json and tensors.safetensors; its README says what each tensor is. The
weights, the pictures and the noise are drawn here, where it does not hold them.
"""

import json
import os
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from drawn_weights import drawn, fan_in
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from clipflow.models.dits.sana import SanaConfig
from clipflow.models.folders.loading import load_names
from clipflow.models.unilip import UniLIPModel
from clipflow.models.unilip.config import (
    DecoderConfig,
    TextConfig,
    TokenIds,
    UniLIPConfig,
    VisionConfig,
)
from clipflow.models.unilip.loading import FORMAT
from clipflow.testing.unilip_folder import published_name

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "unilip_tiny"

WEIGHTS_SEED, PICTURE_SEED, NOISE_SEEDS = 1234, 7, {"noise": 99, "train.noise": 77}

# What the small fixture keeps of large tensors, under their names with ".sample" added.
SAMPLES = {
    "vision.embeddings": (slice(None), slice(None, None, 4)),
    "vision.layer0": (slice(None), slice(None, None, 4)),
    "tokenizer.decoded_512": (..., slice(None, None, 8), slice(None, None, 8)),
    "t2i_left.image_448_hwc_uint8_20steps_g4.5": (slice(None, None, 2), slice(None, None, 2)),
    "edit_left.image_448_hwc_uint8_20steps_g4.5": (slice(None, None, 2), slice(None, None, 2)),
}


@dataclass(frozen=True)
class Fixture:
    """A model in evaluation mode, and the reference's tensors by name."""

    model: UniLIPModel
    tensors: dict[str, Tensor]

    def pair(self, name: str, actual: Tensor) -> tuple[Tensor, Tensor]:
        """(`actual`, what was recorded under `name`), both sampled where the fixture is."""
        if name in self.tensors:
            return actual, self.tensors[name]
        return actual[SAMPLES[name]], self.tensors[f"{name}.sample"]


def parity_dir() -> Path:
    """The folder the parity tests read; CLIPFLOW_PARITY_DIR names another one of the same form."""
    return Path(os.environ.get("CLIPFLOW_PARITY_DIR", TINY))


@cache
def load_fixture() -> Fixture:
    folder = parity_dir()
    model = UniLIPModel(fixture_config(folder))
    load_names(model, recorded_weights(folder), FORMAT)
    model.requires_grad_(False).eval()
    return Fixture(model, recorded_tensors(folder))


@cache
def recorded_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict under the reference's own names."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    with torch.device("meta"):
        own = UniLIPModel(fixture_config(folder)).state_dict()
    shapes = {published_name(name): tuple(tensor.shape) for name, tensor in own.items()}
    return drawn(shapes, WEIGHTS_SEED, _spread)


@cache
def recorded_tensors(folder: Path) -> dict[str, Tensor]:
    """What was recorded, and what the recording began with."""
    return {**drawn_inputs(fixture_config(folder)), **load_file(folder / "tensors.safetensors")}


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that weights were drawn with."""
    if name.endswith((".ls1", ".ls2")):
        return 0.5, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.05
    if name.endswith(("embed_tokens.weight", "latent_queries")) or "tower.embeddings." in name:
        return 0.0, 0.5
    if name.endswith("scale_shift_table"):
        return 0.0, 0.3
    return (1.0, 0.1) if len(shape) == 1 else (0.0, fan_in(shape) ** -0.5)


def drawn_inputs(config: UniLIPConfig) -> dict[str, Tensor]:
    """A picture of 14 x 14 random colors, at two sizes, and noise for one picture and for two."""
    colors = torch.rand(1, 3, 14, 14, generator=torch.Generator().manual_seed(PICTURE_SEED))
    picture = F.interpolate(colors, size=448, mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    pixels = (picture - mean) / std
    shape = (config.decoder.latent_channels, config.latent_side, config.latent_side)
    dice = {name: torch.Generator().manual_seed(seed) for name, seed in NOISE_SEEDS.items()}
    return {
        "image.pixel_values": pixels,
        "image224.pixel_values": F.avg_pool2d(pixels, 2),
        "noise": torch.randn(1, *shape, generator=dice["noise"]),
        "train.noise": torch.randn(2, *shape, generator=dice["train.noise"]),
    }


def fixture_config(folder: Path) -> UniLIPConfig:
    """Our configuration for a fixture folder's config.json."""
    values = json.loads((folder / "config.json").read_text())
    vit, dcae = values["vit"], values["dcae"]
    return UniLIPConfig(
        vision=VisionConfig(**shared(VisionConfig, vit), shuffle=2),
        text=TextConfig(**shared(TextConfig, values["text"])),
        dit=SanaConfig(
            **shared(SanaConfig, values["sana"]),
            position_table=True,
            interpolation_scale=1.0,
        ),
        decoder=DecoderConfig(
            latent_channels=dcae["latent_channels"],
            attention_head_dim=32,
            block_types=tuple(dcae["decoder_block_types"]),
            block_out_channels=tuple(dcae["decoder_block_out_channels"]),
            layers_per_block=tuple(dcae["decoder_layers_per_block"]),
            qkv_multiscales=tuple(tuple(scales) for scales in dcae["decoder_qkv_multiscales"]),
        ),
        tokens=TokenIds(
            pad=values["pad_token_id"],
            img_start=values["img_start_id"],
            img_end=values["img_end_id"],
            img_context=values["img_context_id"],
            im_end=-1,
        ),
        n_query=values["n_query"],
        connect_layer=values["connect_layer"],
        unilip_factor=values["unilip_factor"],
        flow_shift=values["scheduler"]["flow_shift"],
        output_size=vit["image_size"],
        default_guidance_scale=4.5,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        system_message="",
        noise_dtype="bfloat16",
    )


def shared(config: type, values: dict) -> dict:
    """The entries of `values` that are fields of the dataclass `config`."""
    names = {field.name for field in fields(config)}
    return {name: value for name, value in values.items() if name in names}
