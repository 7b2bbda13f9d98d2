"""The recorded outputs of the reference on a tiny random BLIP3-o, and the models they belong to.

The weights are drawn here, where the fixture does not hold them. Of the embedding's rows only those
that are used are kept: `own_ids` gives recorded ids their numbers.
"""

import json
import os
from dataclasses import fields
from functools import cache
from pathlib import Path

import torch
from drawn_weights import drawn, fan_in
from safetensors.torch import load_file
from torch import Tensor

from clipflow.models.blip3o import BLIP3oConfig, BLIP3oModel
from clipflow.models.blip3o.config import MultimodalTextConfig, TokenIds, VisionConfig
from clipflow.models.blip3o.eva import CLIP_MEAN, CLIP_STD
from clipflow.models.blip3o.keys import map_names
from clipflow.models.dits.lumina import LuminaConfig, LuminaTransformer, feed_forward_width
from clipflow.testing.blip3o_folder import published_blip3o_name

NAME = "blip3o_tiny"
SEEDS = {"model": 1234, "dit_gqa_model": 77}
DIT, EMBEDDING = "model.dit.model.", "model.embed_tokens.weight"
# Rows of the embedding that the recordings use, and how many there are.
ROWS = (
    13, 198, 264, 525, 872, 2168, 2610, 5501, 6923, 8948, 10950, 17847, 77091, 151643, 151644,
    151645, 151652, 151653, 151655, 151665, 151667,
)  # fmt: skip
VOCABULARY = 151668
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
def recorded_weights(file: str) -> dict[str, Tensor]:
    """A state dict under the reference's own names, without the head, which was not recorded."""
    if (parity_dir() / f"{file}.safetensors").exists():
        state = recorded(file)
        if f"{EMBEDDING}.rows" in state:
            assert tuple(state.pop(f"{EMBEDDING}.row_ids").tolist()) == ROWS
            state[EMBEDDING] = state.pop(f"{EMBEDDING}.rows")
        return state
    if file == "model":
        cls, config = BLIP3oModel, recorded_config(vocab_size=VOCABULARY)
    else:
        cls, config = LuminaTransformer, lumina_config(_values("dit_gqa_config"))
    with torch.device("meta"):
        own = cls(config).state_dict()
    rename = published_blip3o_name if file == "model" else "model.{}".format
    state = drawn({rename(n): tuple(t.shape) for n, t in own.items()}, SEEDS[file], _spread)
    if file == "model":
        del state["lm_head.weight"]
        state[EMBEDDING] = state[EMBEDDING][list(ROWS)]
    return state


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that weights were drawn with."""
    if len(shape) > 1:
        return 0.0, 0.9 * fan_in(shape) ** -0.5
    return (1.0, 0.2) if name.endswith(".weight") else (0.0, 0.2)


def _values(file: str = "config") -> dict:
    return json.loads((parity_dir() / f"{file}.json").read_text())


@cache
def recorded_dit() -> LuminaTransformer:
    return loaded(_values()["dit"], recorded_weights("model"), DIT)


@cache
def recorded_gqa_dit() -> LuminaTransformer:
    return loaded(_values("dit_gqa_config"), recorded_weights("dit_gqa_model"), "model.")


@cache
def recorded_model() -> BLIP3oModel:
    state = recorded_weights("model")
    own = {name: state[found] for name, found in map_names(state).items()}
    model = BLIP3oModel(recorded_config())
    model.lm_head = None  # was not recorded
    model.load_state_dict(own)
    return model.requires_grad_(False).eval()


def own_ids(ids: Tensor) -> Tensor:
    """The rows of the recorded embedding that recorded ids have; all must be there."""
    known = torch.tensor(ROWS)
    rows = torch.searchsorted(known, ids)
    assert torch.equal(known[rows], ids)
    return rows


def recorded_config(vocab_size: int = len(ROWS)) -> BLIP3oConfig:
    values = _values()
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
            | {"vocab_size": vocab_size},
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
