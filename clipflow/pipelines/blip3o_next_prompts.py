"""The prompt that BLIP3o-NEXT draws from.

Source: specs of BLIP3o-NEXT section B.4: the tokenizer's own chat template, then the tokens that
begin a picture.
"""

from __future__ import annotations

from typing import NoReturn

from clipflow.errors import InputError
from clipflow.pipelines.prompts import MARKERS, Prompts

REQUEST = "Please generate image based on the following caption: {}"
PICTURE_BEGINS = "<im_start><S0>"


class BLIP3oNextPrompts(Prompts):
    """Prompts end where the image tokens begin."""

    reserved = (*MARKERS, "<im_start>", "<im_end>", "<image>")

    @property
    def following(self) -> int:
        """Tokens that are drawn after a prompt."""
        return self.config.tokens_per_image

    def text_to_image(self, prompt: str | None) -> str:
        """The conversation that asks for a picture; blank text is an empty caption."""
        request = REQUEST.format(prompt or "")
        if not getattr(self.tokenizer, "chat_template", None):
            return self.chat([("user", request)]) + PICTURE_BEGINS
        messages = [
            {"role": "system", "content": self.config.system_message},
            {"role": "user", "content": request},
        ]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text + PICTURE_BEGINS

    def edit(self, instruction: str | None) -> NoReturn:
        raise InputError("BLIP3o-NEXT has no prompt for edits")

    def picture(self, size: int | None = None) -> NoReturn:
        raise InputError("BLIP3o-NEXT has no prompt with pictures")
