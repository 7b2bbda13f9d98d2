"""Configuration of a BLIP3o-NEXT model: every size is explicit, nothing has a hidden default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.dits.sana import SanaConfig
from clipflow.models.folders.rules import (
    Rule,
    check_rules,
    multiple,
    noise_dtype,
    positive,
    token_ids,
)
from clipflow.models.folders.saved_config import SavedConfig
from clipflow.models.language.config import TextConfig

MODEL_TYPE = "clipflow_blip3o_next"


@dataclass(frozen=True, kw_only=True)
class Qwen3TextConfig(TextConfig):
    """Qwen3: heads may be wider than their share of the model, and are normed; no biases."""

    head_dim: int


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Ids of the special tokens.

    Attributes:
        pad: fills shorter rows.
        image_start: stands before a picture's tokens, `<im_start>`.
        image_end: would stand behind them, `<im_end>`.
        scale: of the first scale, `<S0>`, which follows `image_start`.
        first_image: of `<I0>`; the others follow it.
        image_count: how many image tokens there are.
        eos: what ends a text; none of them can be drawn unless any token may.
    """

    pad: int
    image_start: int
    image_end: int
    scale: int
    first_image: int
    image_count: int
    eos: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BLIP3oNextConfig(SavedConfig):
    """A whole model.

    Attributes:
        tokens_per_image: image tokens that the language model draws for one picture.
        scaling_factor: what the DiT's latents are multiplied with; divide sampled ones by it.
        default_steps: of sampling.
        output_size: side of the pictures handed to the user.
        system_message: what every prompt begins with.
        noise_dtype: what starting noise is drawn in, whatever the model computes in: with it a seed
            means a picture.

    Raises:
        ValueError: sizes that do not fit together; one error names them all.
    """

    model_type: ClassVar = MODEL_TYPE
    called: ClassVar = "blip3o_next config"

    text: Qwen3TextConfig
    dit: SanaConfig
    decoder: DecoderConfig
    tokens: TokenIds
    tokens_per_image: int
    scaling_factor: float
    flow_shift: float
    default_guidance_scale: float
    default_steps: int
    output_size: int
    system_message: str
    noise_dtype: str

    def __post_init__(self) -> None:
        check_rules(_rules(self), "blip3o_next config")

    @property
    def latent_channels(self) -> int:
        return self.decoder.latent_channels

    @property
    def latent_side(self) -> int:
        """Side of the latent grid of one native-size picture."""
        return self.dit.sample_size


def _rules(config: BLIP3oNextConfig) -> list[Rule]:
    """What must fit together."""
    text, dit, decoder, tokens = config.text, config.dit, config.decoder, config.tokens
    channels = [dit.in_channels, dit.out_channels]
    ids = dataclasses.asdict(tokens)
    ids["last image token"] = tokens.first_image + ids.pop("image_count") - 1
    ids |= {f"eos[{i}]": number for i, number in enumerate(ids.pop("eos"))}
    return [
        *positive(_numbers(config)),
        noise_dtype(config.noise_dtype),
        token_ids(ids, text.vocab_size),
        multiple("text.num_attention_heads", text.num_attention_heads, text.num_key_value_heads),
        multiple("text.head_dim", text.head_dim, 2),
        multiple("dit width", dit.hidden_size, 4),
        (
            f"text.max_position_embeddings must be above {config.tokens_per_image} "
            f"(tokens_per_image), got {text.max_position_embeddings}",
            text.max_position_embeddings <= config.tokens_per_image,
        ),
        (
            f"dit in and out channels must be {decoder.latent_channels} as latents, got {channels}",
            channels != [decoder.latent_channels] * 2,
        ),
        *decoder.rules(),
    ]


def _numbers(config: BLIP3oNextConfig) -> dict[str, object]:
    """Every number of the parts, and the scalars of the model."""
    numbers = {
        f"{part}.{name}": value
        for part in ("text", "dit", "decoder")
        for name, value in dataclasses.asdict(getattr(config, part)).items()
    }
    scalars = ("tokens_per_image", "scaling_factor", "flow_shift", "default_steps", "output_size")
    numbers |= {name: getattr(config, name) for name in scalars}
    return numbers | {"tokens.image_count": config.tokens.image_count}
