"""Prompt templates and token rows of a UniLIP model.

Source: the templates UniLIP was trained with (ChatML turns, no system message for pictures).
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
        self._image = f"<img>{IMAGE_TOKEN * config.latent_side**2}</img>"

    def text_to_image(self, prompt: str | None) -> str:
        """The turn that asks for a picture; None or blank text is the null prompt."""
        text = f"Generate an image: {prompt}" if _given(prompt) else "Generate an image."
        return _turn(text) + "<img>"

    def edit(self, instruction: str | None) -> str:
        """The turn that asks for an edit of the picture in it; None or blank is the null prompt."""
        text = f"Edit the image: {instruction}" if _given(instruction) else "Edit the image."
        return _turn(f"{text}\n{self._image}") + "<img>"

    def question(self, text: str) -> str:
        """The turn that asks about a picture."""
        system = self.config.system_message
        head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return head + _turn(f"{self._image}\n{text}")

    def rows(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of `texts`, both [B, T] int64, padded on the left.

        Raises:
            InputError: a text is longer than the model can read.
        """
        rows = [self.ids(text) for text in texts]
        width = max(len(row) for row in rows)
        room = self.config.text.max_position_embeddings - self.config.n_query
        if width > room:
            raise InputError(f"prompt must have at most {room} tokens in all, got {width}")
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
