"""Configuration of a BLIP3-o model: every size is explicit, nothing has a hidden default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from clipflow.models.blip3o.eva import EVAConfig
from clipflow.models.dits.lumina import LuminaConfig
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

MODEL_TYPE = "clipflow_blip3o"


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Qwen2.5-VL's vision transformer.

    Pictures of all sizes are read; `image_size` is the side that drawing and editing resize them
    to. `spatial_merge_size` squared patches are one feature. Attention is within windows of
    `window_size` pixels but for the blocks of `fullatt_block_indexes`.
    """

    hidden_size: int
    depth: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    image_size: int

    @property
    def feature_pixels(self) -> int:
        """Side of the square of pixels that one feature is of."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True, kw_only=True)
class MultimodalTextConfig(TextConfig):
    """Qwen2.5-VL's language model, whose rotary positions have three axes.

    `mrope_section` says how many pairs of a head turn with time, row and column.
    """

    mrope_section: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Ids of the special tokens; `image_start` stands before the queries, after the prompt."""

    pad: int
    im_end: int
    image_pad: int
    vision_start: int
    vision_end: int
    image_start: int


@dataclass(frozen=True, kw_only=True)
class BLIP3oConfig(SavedConfig):
    """A whole model.

    Attributes:
        target: the vision tower whose pooled features the DiT learned to draw, where the model
            has it.
        latent_side: side of the grid of features that is drawn.
        default_steps: of sampling.
        output_size: side of the pictures handed to the user.
        system_message: what every prompt begins with.
        noise_dtype: what starting noise is drawn in, whatever the model computes in: with it a seed
            means a picture.
        edits: whether it was trained to edit pictures; published ones were not.

    Raises:
        ValueError: sizes that do not fit together; one error names them all.
    """

    model_type: ClassVar = MODEL_TYPE
    called: ClassVar = "blip3o config"

    vision: VisionConfig
    text: MultimodalTextConfig
    dit: LuminaConfig
    tokens: TokenIds
    target: EVAConfig | None
    n_query: int
    latent_side: int
    flow_shift: float
    default_guidance_scale: float
    default_steps: int
    output_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    system_message: str
    noise_dtype: str
    edits: bool = False

    def __post_init__(self) -> None:
        check_rules(_rules(self), "blip3o config")

    @property
    def latent_channels(self) -> int:
        """Width of the features that are drawn."""
        return self.dit.in_channels

    @property
    def image_size(self) -> int:
        """Side of the pictures that drawing and editing read."""
        return self.vision.image_size


def _rules(config: BLIP3oConfig) -> list[Rule]:
    """What must fit together."""
    vision, text, dit = config.vision, config.text, config.dit
    head_dim = text.hidden_size // max(text.num_attention_heads, 1)
    pairs, blocks = sum(text.mrope_section), list(vision.fullatt_block_indexes)
    return [
        *positive(_numbers(config)),
        image_mean(config.image_mean),
        noise_dtype(config.noise_dtype),
        token_ids(dataclasses.asdict(config.tokens), text.vocab_size),
        multiple("vision.image_size", vision.image_size, vision.feature_pixels),
        multiple("vision.window_size", vision.window_size, vision.feature_pixels),
        multiple("vision.hidden_size", vision.hidden_size, 4 * vision.num_heads),
        multiple("text.hidden_size", text.hidden_size, text.num_attention_heads),
        multiple("text.num_attention_heads", text.num_attention_heads, text.num_key_value_heads),
        multiple("dit.hidden_size", dit.hidden_size, 4 * dit.num_attention_heads),
        multiple("dit.num_attention_heads", dit.num_attention_heads, dit.num_kv_heads),
        multiple("latent_side", config.latent_side, dit.patch_size),
        (
            f"text.mrope_section must be of {head_dim // 2} pairs, half of a head, got {pairs}",
            2 * pairs != head_dim or min(text.mrope_section) < 0,
        ),
        (
            f"vision.fullatt_block_indexes must be of 0 to {vision.depth - 1}, got {blocks}",
            any(not 0 <= block < vision.depth for block in blocks),
        ),
        (
            f"dit.condition_channels must be {text.hidden_size} as text.hidden_size, got "
            f"{dit.condition_channels}",
            dit.condition_channels != text.hidden_size,
        ),
        *_target_rules(config),
    ]


def _target_rules(config: BLIP3oConfig) -> list[Rule]:
    """The target's features must be those that are drawn."""
    if config.target is None:
        return []
    found = [config.target.hidden_size, config.target.target_side]
    wanted = [config.dit.in_channels, config.latent_side]
    text = f"target features must be {wanted} (channels, side) as the DiT draws, got {found}"
    return [(text, found != wanted)]


def _numbers(config: BLIP3oConfig) -> dict[str, object]:
    """Every number of the parts, and the scalars of the model."""
    numbers = {
        f"{part}.{name}": value
        for part in ("vision", "text", "dit")
        for name, value in dataclasses.asdict(getattr(config, part)).items()
    }
    scalars = ("n_query", "latent_side", "flow_shift", "default_guidance_scale", "default_steps")
    numbers |= {name: getattr(config, name) for name in (*scalars, "output_size")}
    return numbers | {f"image_std[{i}]": value for i, value in enumerate(config.image_std)}
