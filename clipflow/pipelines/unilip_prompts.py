"""Prompt templates of UniLIP's models.

Source: the templates UniLIP was trained with (ChatML turns, no system message for pictures), and
InternVL's conversations.
"""

from __future__ import annotations

from clipflow.pipelines.prompts import MARKERS, Prompts, is_given

IMAGE_TOKEN = "<IMG_CONTEXT>"


class UniLIPPrompts(Prompts):
    """Pictures are squares, or tiles that are squares, of `latent_side` squared tokens each."""

    reserved = (*MARKERS, "<img>", "</img>", IMAGE_TOKEN, "<image>")

    def text_to_image(self, prompt: str | None) -> str:
        text = f"Generate an image: {prompt}" if is_given(prompt) else "Generate an image."
        return _turn(text) + "<img>"

    def edit(self, instruction: str | None) -> str:
        text = f"Edit the image: {instruction}" if is_given(instruction) else "Edit the image."
        return _turn(f"{text}\n{self._image(1)}") + "<img>"

    def picture(self, size: int | None = None) -> str:
        """Of `size` tiles; 1 if None."""
        return self._image(1 if size is None else size) + "\n"

    def _image(self, tiles: int) -> str:
        return f"<img>{IMAGE_TOKEN * (tiles * self.config.latent_side**2)}</img>"


def _turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
