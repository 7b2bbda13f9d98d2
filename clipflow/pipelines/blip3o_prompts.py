"""Prompt templates of BLIP3-o's models: Qwen2.5-VL's conversations, and requests for pictures.

Source: Chen et al., "BLIP3-o" (2025) and its published code; specs of BLIP3-o, sections A.2, A.8
and A.9.
"""

from __future__ import annotations

from clipflow.pipelines.prompts import MARKERS, Prompts, is_given

IMAGE_TOKEN = "<|image_pad|>"
IMAGE_START = "[IMG]"  # before the queries
RECONSTRUCT = "Please reconstruct the given image."


class BLIP3oPrompts(Prompts):
    """Pictures are of any number of tokens; those that are drawn follow `[IMG]`."""

    reserved = (
        *MARKERS,
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        IMAGE_TOKEN,
        "<|video_pad|>",
        IMAGE_START,
        "[/IMG]",
        "<image>",
    )

    def text_to_image(self, prompt: str | None) -> str:
        """The conversation that asks for a picture.

        None or blank text is a space without a template, of which the decoder's sampled null
        condition is made (section A.8).
        """
        if not is_given(prompt):
            return " " + IMAGE_START
        text = f"Please generate image based on the following caption: {prompt}"
        return self.chat([("user", text)]) + IMAGE_START

    def edit(self, instruction: str | None) -> str:
        """The conversation that asks for a picture like the one in it; None or blank: the same."""
        text = instruction if is_given(instruction) else RECONSTRUCT
        return self.chat([("user", f"{self.picture()}\n{text}")]) + IMAGE_START

    def picture(self, size: int | None = None) -> str:
        """Of `size` tokens; those of a picture of the native size if None."""
        if size is None:
            size = (self.config.image_size // self.config.vision.feature_pixels) ** 2
        return f"<|vision_start|>{IMAGE_TOKEN * size}<|vision_end|>"
