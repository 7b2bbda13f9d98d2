"""Answers token by token: when they end, their text, and the pieces they are streamed in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from clipflow.errors import InputError
from clipflow.models.language.reading import Reading
from clipflow.models.language.token_sampling import TokenSampling


@dataclass(frozen=True, kw_only=True)
class AnswerEnd:
    """What ends an answer; none of it is part of the answer.

    Attributes:
        tokens: ids.
        texts: looked for in the text without special tokens.
        max_new_tokens: the longest answer.
    """

    tokens: frozenset[int]
    texts: tuple[str, ...] = ()
    max_new_tokens: int


def stop_texts(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The texts of an argument `stop`.

    Raises:
        InputError: it is neither a text nor a list of them, or one is empty.
    """
    texts = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) and t for t in texts):
        raise InputError(f"stop must be a text that is not empty, or a list of them, got {stop!r}")
    return tuple(texts)


class Answer:
    """The answer of one row, while it is being made.

    Attributes:
        tokens: ids so far, without the one that ended it.
        done: whether it has ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: AnswerEnd) -> None:
        self.tokens: list[int] = []
        self.done = False
        self._tokenizer = tokenizer
        self._end = end
        self._length: int | None = None  # of the text, where a stop text cut it

    def add(self, token: int) -> None:
        """The next token; nothing happens once the answer has ended."""
        if self.done:
            return
        if token in self._end.tokens:
            self.done = True
            return
        self.tokens.append(token)
        if self._end.texts:
            text = self._decoded()
            places = [place for stop in self._end.texts if (place := text.find(stop)) >= 0]
            if places:
                self.done, self._length = True, min(places)
        self.done |= len(self.tokens) == self._end.max_new_tokens

    @property
    def text(self) -> str:
        """All that was said, without blanks around it."""
        return self._decoded()[: self._length].strip()

    @property
    def settled(self) -> str:
        """The beginning of `text` that no later token can change."""
        text = self._decoded()[: self._length]
        if self.done:
            return text.strip()
        if text.endswith("\ufffd"):  # a character of which some bytes are yet to come
            return ""
        return text[: len(text) - self._waiting(text)].strip()

    def _waiting(self, text: str) -> int:
        """How many characters at the end of `text` may turn out to begin a stop text."""
        return max(
            (
                count
                for stop in self._end.texts
                for count in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:count])
            ),
            default=0,
        )

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        return text


@torch.no_grad()
def make_answers(
    reading: Reading,
    answers: Sequence[Answer],
    sampling: TokenSampling,
    dice: Sequence[torch.Generator],
) -> Iterator[None]:
    """Add tokens to the answers of a reading's rows until all have ended; yields after each."""
    known = None if sampling.repetition_penalty == 1 else reading.tokens_of_prompts()
    while True:
        tokens = sampling.choose(reading.next_logits, dice, known)
        if known is not None:
            known.scatter_(1, tokens[:, None], value=True)
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            answer.add(token)
        yield
        if all(answer.done for answer in answers):
            return
        reading.extend(tokens)


def text_pieces(answer: Answer, steps: Iterator[None]) -> Iterator[str]:
    """The text of `answer` in pieces that join to the whole; `steps` make it."""
    said = ""
    for _ in steps:
        settled = answer.settled
        if settled.startswith(said) and settled != said:
            yield settled[len(said) :]
            said = settled
