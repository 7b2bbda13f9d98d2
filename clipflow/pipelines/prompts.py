"""Prompts: what the templates of all families share, and token rows of them.

Source: OpenAI's ChatML, which Qwen's language models were trained with.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clipflow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In a user's text these would be read as structure of the prompt, whatever the family.
MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LABEL_QUESTION = "describe the picture"


class UnknownWordWarning(UserWarning):
    """A prompt has words that the model's tokenizer does not know."""


class Prompts(ABC):
    """Writes the prompts of a family's models and turns them into left-padded token rows.

    Attributes:
        reserved: markers that no user's text may have.
    """

    reserved: ClassVar[tuple[str, ...]] = MARKERS

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
        """Write for the model of `config`, which has `system_message`, `n_query`, `tokens.pad` and
        `text.max_position_embeddings`.
        """
        self.tokenizer = tokenizer
        self.config = config

    @abstractmethod
    def text_to_image(self, prompt: str | None) -> str:
        """The conversation that asks for a picture; None or blank text is the null prompt."""

    @abstractmethod
    def edit(self, instruction: str | None) -> str:
        """The conversation that asks for an edit of the picture in it; None or blank is no wish."""

    @abstractmethod
    def picture(self, size: int | None = None) -> str:
        """The place of a picture before a user's words.

        `size` is how much of it the model sees, in the family's own unit; None is what it sees of
        a picture that is to be edited.
        """

    @property
    def following(self) -> int:
        """Positions that follow a prompt for a picture: the learned queries."""
        return self.config.n_query

    def question(self, text: str) -> str:
        """The conversation that asks about a picture of the native size."""
        return self.chat([("user", self.picture() + text)])

    def chat(self, turns: Sequence[tuple[str, str]]) -> str:
        """The conversation of `turns` (role, text), up to where the assistant answers.

        The model's own system message, if it has one, begins a conversation that has none; an
        empty one is left out.
        """
        if turns[0][0] != "system":
            turns = [("system", self.config.system_message), *turns]
        said = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns if text]
        return "".join(said) + "<|im_start|>assistant\n"

    def check(self, name: str, value: object) -> str:
        """`check_text` with the family's markers."""
        return check_text(name, value, self.reserved)

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
        following = self.following if following is None else following
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


def check_text(name: str, value: object, reserved: Sequence[str] = MARKERS) -> str:
    """Refuse what is no text, blank, or would be read as structure of the prompt.

    Raises:
        InputError: with what was found and what is wanted.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{name} must not be empty")
    for marker in reserved:
        if marker in value:
            raise InputError(f"{name} must not contain the marker {marker!r}")
    return value


def is_given(text: str | None) -> bool:
    """Whether there is a text, and not only blanks."""
    return text is not None and bool(text.strip())
