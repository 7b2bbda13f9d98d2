"""The recorded outputs of the reference on a tiny random BLIP3o-NEXT, and the model of them."""

import json
import os
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipflow.models.blip3o_next import BLIP3oNextConfig, BLIP3oNextModel
from clipflow.models.blip3o_next.config import Qwen3TextConfig, TokenIds
from clipflow.models.blip3o_next.keys import own_name
from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.dits.sana import SanaConfig

NAME = "blip3o_next_tiny"
TINY = Path(__file__).parent / "fixtures" / NAME
SANA_FIELDS = (
    "in_channels", "out_channels", "num_layers", "num_attention_heads", "attention_head_dim",
    "num_cross_attention_heads", "cross_attention_head_dim", "caption_channels", "mlp_ratio",
    "sample_size", "qk_norm",
)  # fmt: skip
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "max_position_embeddings",
    "tie_word_embeddings",
)  # fmt: skip
# The recordings have none: they end with the latents.
DECODER = DecoderConfig(
    latent_channels=4, attention_head_dim=16, block_types=("ResBlock", "EfficientViTBlock"),
    block_out_channels=(16, 32), layers_per_block=(1, 1), qkv_multiscales=((), (5,)),
)  # fmt: skip


def parity_dir() -> Path:
    """The folder the parity tests read: that of this name in CLIPFLOW_PARITY_DIR or beside it."""
    given = Path(os.environ.get("CLIPFLOW_PARITY_DIR", TINY.parent))
    known = (given, given / NAME, given.parent / NAME)
    return next((folder for folder in known if folder.name == NAME and folder.is_dir()), TINY)


@cache
def recorded() -> dict[str, Tensor]:
    """By name; both fixtures have `mid.connector_out.null` [1, C] and `.cond` [L, C]."""
    tensors = load_file(parity_dir() / "io.safetensors")
    whole = tensors.pop("mid.connector_out", None)
    if whole is not None:
        tensors["mid.connector_out.null"], tensors["mid.connector_out.cond"] = (
            whole[0, :1],
            whole[1],
        )
    return tensors


@cache
def recorded_model() -> BLIP3oNextModel:
    """With the recorded weights in float32; the connector's are random in the small fixture."""
    values = json.loads((parity_dir() / "config.json").read_text())
    torch.manual_seed(0)
    model = BLIP3oNextModel(fixture_config(values))
    weights = load_file(parity_dir() / "model.safetensors")
    state = {own_name(name): tensor.float() for name, tensor in weights.items()}
    found = model.load_state_dict(state, strict=False)
    absent = {name.split(".")[0] for name in found.missing_keys}
    assert absent <= {"vae", "diffusion_connector"} and not found.unexpected_keys
    return model.requires_grad_(False).eval()


def has_connector() -> bool:
    """Whether the whole recording is at hand."""
    return parity_dir() != TINY


def fixture_config(values: dict, *, tokens_per_image: int = 8) -> BLIP3oNextConfig:
    """Our configuration for a recorded config.json."""
    llm, sana = values["llm"], values["sana"]
    first = llm["image_start_token_id"]
    return BLIP3oNextConfig(
        text=Qwen3TextConfig(**{name: llm[name] for name in TEXT_FIELDS}),
        dit=SanaConfig(
            **{name: sana[name] for name in SANA_FIELDS},
            norm_eps=1e-6,
            position_table=False,
            interpolation_scale=1.0,
        ),
        decoder=DECODER,
        tokens=TokenIds(
            pad=llm["pad_token_id"],
            image_start=llm["image_start_tag_id"],
            image_end=llm["image_end_tag_id"],
            scale=llm["scale_start_token_id"],
            first_image=first,
            image_count=llm["image_end_token_id"] - first + 1,
            eos=(llm["eos_token_id"],),
        ),
        tokens_per_image=tokens_per_image,
        scaling_factor=0.41407,
        flow_shift=values["scheduler"]["shift"],
        default_guidance_scale=values["guidance"],
        default_steps=values["steps"],
        output_size=64,
        system_message="You are a helpful assistant.",
        noise_dtype="bfloat16",
    )
