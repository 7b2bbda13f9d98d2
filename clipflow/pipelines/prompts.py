"""Prompt templates and token rows of a UniLIP model.

Source: the templates UniLIP was trained with (ChatML turns, no system message for pictures), and
InternVL's conversations.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipflow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from clipflow.models.unilip.config import UniLIPConfig

IMAGE_TOKEN = "<IMG_CONTEXT>"
# In a user's text these would be read as structure of the prompt.
RESERVED = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<img>",
    "</img>",
    IMAGE_TOKEN,
    "<image>",
)
LABEL_QUESTION = "describe the picture"


class UnknownWordWarning(UserWarning):
    """A prompt has words that the model's tokenizer does not know."""


class Prompts:
    """Writes the model's prompts and turns them into left-padded token rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: UniLIPConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config

    def text_to_image(self, prompt: str | None) -> str:
        """The turn that asks for a picture; None or blank text is the null prompt."""
        text = f"Generate an image: {prompt}" if _given(prompt) else "Generate an image."
        return _turn(text) + "<img>"

    def edit(self, instruction: str | None) -> str:
        """The turn that asks for an edit of the picture in it; None or blank is the null prompt."""
        text = f"Edit the image: {instruction}" if _given(instruction) else "Edit the image."
        return _turn(f"{text}\n{self.image()}") + "<img>"

    def question(self, text: str) -> str:
        """The conversation that asks about a picture of one tile."""
        return self.chat([("user", f"{self.image()}\n{text}")])

    def image(self, tiles: int = 1) -> str:
        """The place of a picture of so many tiles."""
        return f"<img>{IMAGE_TOKEN * (tiles * self.config.latent_side**2)}</img>"

    def chat(self, turns: Sequence[tuple[str, str]]) -> str:
        """The conversation of `turns` (role, text), up to where the assistant answers.

        The model's own system message, if it has one, begins a conversation that has none; an
        empty one is left out.
        """
        if turns[0][0] != "system":
            turns = [("system", self.config.system_message), *turns]
        said = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns if text]
        return "".join(said) + "<|im_start|>assistant\n"

    def rows(
        self, texts: Sequence[str], device: torch.device, *, following: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of `texts`, both [B, T] int64, padded on the left.

        Args:
            texts: prompts.
            device: of the result.
            following: tokens that the model must be able to read after them; the learned queries
                when not given.

        Raises:
            InputError: a text is longer than the model can read.
        """
        rows = [self.ids(text) for text in texts]
        width = max(len(row) for row in rows)
        following = self.config.n_query if following is None else following
        positions = self.config.text.max_position_embeddings
        if width + following > positions:
            raise InputError(
                f"prompt must have at most {positions - following} tokens in all (the model reads "
                f"{positions}, and {following} follow), got {width}"
            )
        pad = self.config.tokens.pad
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids.to(device), mask.to(device)

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`; words that the tokenizer does not know are warned about."""
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = tokens["input_ids"]
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            spans = zip(ids, tokens["offset_mapping"], strict=True)
            words = dict.fromkeys(text[a:b] for token, (a, b) in spans if token == unknown)
            listed = ", ".join(map(repr, words))
            message = f"the model does not know {listed}"
            warnings.warn(message, UnknownWordWarning, stacklevel=2)
        return ids


def check_text(name: str, value: object) -> str:
    """Refuse what is no text, blank, or would be read as structure of the prompt.

    Raises:
        InputError: with what was found and what is wanted.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{name} must not be empty")
    for marker in RESERVED:
        if marker in value:
            raise InputError(f"{name} must not contain the marker {marker!r}")
    return value


def _given(text: str | None) -> bool:
    return text is not None and bool(text.strip())


def _turn(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
