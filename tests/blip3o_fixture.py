"""The recorded outputs of the reference on a tiny random BLIP3-o, and the models they belong to.

Of the recorded embedding only the rows that are used are there, and the model here has no others:
`own_ids` gives recorded ids its numbers.
"""

import json
import os
from dataclasses import fields
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipflow.models.blip3o import BLIP3oConfig, BLIP3oModel
from clipflow.models.blip3o.config import MultimodalTextConfig, TokenIds, VisionConfig
from clipflow.models.blip3o.eva import CLIP_MEAN, CLIP_STD
from clipflow.models.dits.lumina import LuminaConfig, LuminaTransformer, feed_forward_width

NAME = "blip3o_tiny"
QUERY = 151667  # the id at the places of queries in training
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


@cache
def recorded_model() -> BLIP3oModel:
    state = dict(recorded("model"))
    state.pop("model.embed_tokens.weight.row_ids")
    state["model.embed_tokens.weight"] = state.pop("model.embed_tokens.weight.rows")
    begins = {"model.dit.model.": "dit.", "model.latent": "latent", "model.": "language_model."}
    own = {}
    for name, tensor in state.items():
        begin = next((begin for begin in begins if name.startswith(begin)), "")
        own[begins.get(begin, "") + name.removeprefix(begin)] = tensor
    model = BLIP3oModel(recorded_config())
    model.lm_head = None  # was not recorded
    model.load_state_dict(own)
    return model.requires_grad_(False).eval()


def own_ids(ids: Tensor) -> Tensor:
    """The rows of the recorded embedding that recorded ids have; all must be there."""
    known = recorded("model")["model.embed_tokens.weight.row_ids"]
    rows = torch.searchsorted(known, ids)
    assert torch.equal(known[rows], ids)
    return rows


def recorded_config() -> BLIP3oConfig:
    values = json.loads((parity_dir() / "config.json").read_text())
    mllm, vision = values["mllm"], values["mllm"]["vision_config"]
    ids = (151643, 151645, 151655, 151652, 151653, 151665)
    pad, im_end, image_pad, vision_start, vision_end, image_start = own_ids(
        torch.tensor(ids)
    ).tolist()
    return BLIP3oConfig(
        vision=VisionConfig(
            **{name: vision[name] for name in names_of(VisionConfig) & vision.keys()}
            | {"fullatt_block_indexes": tuple(vision["fullatt_block_indexes"])},
            image_size=56,
        ),
        text=MultimodalTextConfig(
            **{name: mllm[name] for name in names_of(MultimodalTextConfig) & mllm.keys()}
            | {"vocab_size": len(recorded("model")["model.embed_tokens.weight.row_ids"])},
            mrope_section=tuple(mllm["rope_scaling"]["mrope_section"]),
        ),
        dit=lumina_config(values["dit"]),
        tokens=TokenIds(
            pad=pad,
            im_end=im_end,
            image_pad=image_pad,
            vision_start=vision_start,
            vision_end=vision_end,
            image_start=image_start,
        ),
        target=None,
        n_query=mllm["n_query"],
        latent_side=values["dit"]["input_size"],
        flow_shift=values["scheduler"]["shift"],
        default_guidance_scale=3.0,
        default_steps=30,
        output_size=1024,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        system_message="",
        noise_dtype="float32",
    )


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


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
