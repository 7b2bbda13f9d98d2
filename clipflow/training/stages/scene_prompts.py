"""The prompts of each family as the recipes of the scenes world write them."""

from __future__ import annotations

from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.unilip.config import UniLIPConfig
from clipflow.pipelines.prompts import MARKERS, Prompts
from clipflow.pipelines.unilip_prompts import UniLIPPrompts
from clipflow.scenes.tokenizer import make_blip3o_tokenizer, make_tokenizer

SceneConfig = UniLIPConfig | BLIP3oConfig


class BLIP3oScenePrompts(Prompts):
    """BLIP3-o's templates without a system message (specs of BLIP3-o, sections A.2 and A.9).

    An instruction to edit comes before the picture: what reads the picture knows what to change.
    """

    reserved = (*MARKERS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "[IMG]")

    def text_to_image(self, prompt: str | None) -> str:
        text = f"Please generate image based on the following caption: {prompt or ''}"
        return self.chat([("user", text)]) + "[IMG]"

    def edit(self, instruction: str | None) -> str:
        text = f"Please edit the given image based on the following instruction: {instruction or ''}"
        return self.chat([("user", f"{text}\n{self.picture()}")]) + "[IMG]"

    def picture(self, size: int | None = None) -> str:
        """Of `size` features; those of the native size if None."""
        size = feature_side(self.config) ** 2 if size is None else size
        return "<|vision_start|>" + "<|image_pad|>" * size + "<|vision_end|>"


def scene_prompts(config: SceneConfig) -> Prompts:
    """The templates that a scenes model of this configuration is trained with."""
    if isinstance(config, BLIP3oConfig):
        return BLIP3oScenePrompts(make_blip3o_tokenizer(), config)
    return UniLIPPrompts(make_tokenizer(), config)


def feature_side(config: SceneConfig) -> int:
    """Features per side of a picture that the language model reads."""
    vision = config.vision
    merged = vision.feature_pixels if isinstance(config, BLIP3oConfig) else (
        vision.patch_size * vision.shuffle
    )  # fmt: skip
    return vision.image_size // merged
