"""The prompts of each family as the recipes of the scenes world write them."""

from __future__ import annotations

from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.unilip.config import UniLIPConfig
from clipflow.pipelines.blip3o_prompts import BLIP3oPrompts
from clipflow.pipelines.prompts import Prompts
from clipflow.pipelines.unilip_prompts import UniLIPPrompts
from clipflow.scenes.tokenizer import make_blip3o_tokenizer, make_tokenizer

SceneConfig = UniLIPConfig | BLIP3oConfig


def scene_prompts(config: SceneConfig) -> Prompts:
    """The templates that a scenes model of this configuration is trained with."""
    if isinstance(config, BLIP3oConfig):
        return BLIP3oPrompts(make_blip3o_tokenizer(), config)
    return UniLIPPrompts(make_tokenizer(), config)


def feature_side(config: SceneConfig) -> int:
    """Features per side of a picture that the language model reads."""
    if isinstance(config, BLIP3oConfig):
        return config.image_size // config.vision.feature_pixels
    return config.latent_side
