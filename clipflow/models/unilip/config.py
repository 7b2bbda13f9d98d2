"""Configuration of a UniLIP model: every size is explicit, nothing has a hidden default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.dits.sana import SanaConfig
from clipflow.models.folders.rules import (
    Rule,
    check_rules,
    image_mean,
    multiple,
    noise_dtype,
    positive,
    token_ids,
)
from clipflow.models.folders.saved_config import SavedConfig
from clipflow.models.language.config import TextConfig

MODEL_TYPE = "clipflow_unilip"


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """InternViT. `shuffle` x `shuffle` patches are folded into one feature (pixel shuffle)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    shuffle: int
    layer_norm_eps: float


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Ids of the special tokens; `im_end` is -1 where the vocabulary has no such token."""

    pad: int
    img_start: int
    img_end: int
    img_context: int
    im_end: int


@dataclass(frozen=True, kw_only=True)
class UniLIPConfig(SavedConfig):
    """A whole model.

    `output_size` is the side of the pictures handed to the user (the decoder's are resized to it);
    `system_message` begins every understanding prompt when it is not empty; `noise_dtype` is what
    starting noise is drawn in, whatever the model computes in: with it a seed means a picture.

    Raises:
        ValueError: sizes that do not fit together; one error names them all.
    """

    model_type: ClassVar = MODEL_TYPE
    called: ClassVar = "unilip config"

    vision: VisionConfig
    text: TextConfig
    dit: SanaConfig
    decoder: DecoderConfig
    tokens: TokenIds
    n_query: int
    connect_layer: int
    unilip_factor: float
    flow_shift: float
    output_size: int
    default_guidance_scale: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    system_message: str
    noise_dtype: str

    def __post_init__(self) -> None:
        check_rules(_rules(self), "unilip config")

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def latent_side(self) -> int:
        """Side of the latent grid: one cell for each feature."""
        return self.vision.image_size // (self.vision.shuffle * self.vision.patch_size)

    @property
    def latent_channels(self) -> int:
        return self.decoder.latent_channels


def _rules(config: UniLIPConfig) -> list[Rule]:
    """What must fit together."""
    vision, text, dit, decoder = config.vision, config.text, config.dit, config.decoder
    channels = [dit.in_channels, dit.out_channels]
    return [
        *positive(_numbers(config)),
        image_mean(config.image_mean),
        multiple("vision.image_size", vision.image_size, vision.shuffle * vision.patch_size),
        multiple("vision.hidden_size", vision.hidden_size, vision.num_attention_heads),
        multiple("text.hidden_size", text.hidden_size, text.num_attention_heads),
        multiple("text.num_attention_heads", text.num_attention_heads, text.num_key_value_heads),
        multiple("dit width", dit.hidden_size, 4),
        (
            f"dit in and out channels must be {decoder.latent_channels} as latents, got {channels}",
            channels != [decoder.latent_channels] * 2,
        ),
        *decoder.rules(),
        token_ids(dataclasses.asdict(config.tokens), text.vocab_size),
        noise_dtype(config.noise_dtype),
    ]


def _numbers(config: UniLIPConfig) -> dict[str, object]:
    """Every number of the parts, and the scalars of the model."""
    numbers = {
        f"{part}.{name}": value
        for part in ("vision", "text", "dit", "decoder")
        for name, value in dataclasses.asdict(getattr(config, part)).items()
    }
    for name in ("n_query", "connect_layer", "unilip_factor", "flow_shift", "output_size"):
        numbers[name] = getattr(config, name)
    return numbers | {f"image_std[{i}]": value for i, value in enumerate(config.image_std)}
