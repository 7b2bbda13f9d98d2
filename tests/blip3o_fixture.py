"""The recorded outputs of the reference on a tiny random BLIP3-o, and the DiTs they belong to."""

import json
import os
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipflow.models.dits.lumina import LuminaConfig, LuminaTransformer, feed_forward_width

NAME = "blip3o_tiny"
TINY = Path(__file__).parent / "fixtures" / NAME


def parity_dir() -> Path:
    """The folder the parity tests read: CLIPFLOW_PARITY_DIR where that is one of this form, or
    the one beside it or inside."""
    given = Path(os.environ.get("CLIPFLOW_PARITY_DIR", TINY))
    known = [folder for folder in (given, given / NAME, given.parent / NAME) if folder.is_dir()]
    return next((folder for folder in known if (folder / "dit_gqa_config.json").exists()), TINY)


@cache
def recorded(file: str = "io") -> dict[str, Tensor]:
    return load_file(parity_dir() / f"{file}.safetensors")


@cache
def recorded_dit() -> LuminaTransformer:
    values = json.loads((parity_dir() / "config.json").read_text())["dit"]
    return loaded(values, recorded("model"), "model.dit.model.")


@cache
def recorded_gqa_dit() -> LuminaTransformer:
    values = json.loads((parity_dir() / "dit_gqa_config.json").read_text())
    return loaded(values, recorded("dit_gqa_model"), "model.")


def loaded(values: dict, state: dict[str, Tensor], prefix: str) -> LuminaTransformer:
    with torch.device("meta"):
        dit = LuminaTransformer(lumina_config(values))
    own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    dit.load_state_dict(own, assign=True)
    return dit.requires_grad_(False).eval()


def lumina_config(values: dict) -> LuminaConfig:
    """Our configuration for a recorded NextDiTCrossAttnConfig."""
    return LuminaConfig(
        in_channels=values["in_channels"],
        hidden_size=values["dim"],
        num_layers=values["n_layers"],
        num_attention_heads=values["n_heads"],
        num_kv_heads=values["n_kv_heads"],
        intermediate_size=feed_forward_width(values["dim"], values["multiple_of"]),
        condition_channels=values["latent_embedding_size"],
        patch_size=values["patch_size"],
        norm_eps=values["norm_eps"],
        rope_theta=10000.0,
    )
