"""Answers and label likelihoods from the language model, with a key-value cache."""

# Shape suffixes: B = batch, T = prompt tokens, N = image tokens, H = LM width, M = label tokens.

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from clipflow.models.unilip.model import UniLIPModel

LABELS_AT_ONCE = 64


class Reading:
    """A prompt the language model has read; it can be continued token by token."""

    def __init__(self, model: UniLIPModel, ids: Tensor, mask: Tensor, features: Tensor) -> None:
        """Read `ids` [B, T] (left-padded by `mask`) with the pictures' `features` [B, N, H]."""
        self.model = model
        self.mask = mask
        self.cache = DynamicCache(config=model.language_model.config)
        embeddings = model.embed_prompt(ids, features)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self._forward(embeddings, positions)
        self.next_logits = model.head(hidden[:, -1]).float()

    def copies(self, count: int) -> Reading:
        """`count` rows that each continue this reading of a single prompt."""
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache)
        twin.cache.batch_repeat_interleave(count)
        twin.mask = self.mask.expand(count, -1)
        twin.next_logits = self.next_logits.expand(count, -1)
        return twin

    def extend(self, ids: Tensor) -> Tensor:
        """Read `ids` [B, M] on; returns float32 logits [B, M, V] of what follows each of them."""
        first = self.mask.sum(-1, keepdim=True)
        positions = first + torch.arange(ids.shape[1], device=ids.device)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        logits = self.model.head(self._forward(self.model.embed_prompt(ids), positions)).float()
        self.next_logits = logits[:, -1]
        return logits

    def _forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return self.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


@torch.no_grad()
def greedy_tokens(reading: Reading, stop: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Yield the likeliest next token of each row until all rows have said `stop`."""
    done = torch.zeros(reading.mask.shape[0], dtype=torch.bool, device=reading.mask.device)
    for count in range(max_new_tokens):
        tokens = reading.next_logits.argmax(-1).masked_fill(done, stop)
        done |= tokens == stop
        yield tokens.tolist()
        if done.all():
            return
        if count + 1 < max_new_tokens:
            reading.extend(tokens[:, None])


def text_pieces(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterator[list[int]], stop: int
) -> Iterator[str]:
    """Text of the single row in `tokens`, in pieces that join to the whole answer."""
    ids: list[int] = []
    said = ""
    for (token,) in tokens:
        if token == stop:
            break
        ids.append(token)
        text = answer_text(tokenizer, ids, strip=False)
        # An unfinished UTF-8 sequence and a trailing blank wait for what follows.
        if text.startswith(said) and not text.endswith("\ufffd"):
            ready = text.rstrip()
            piece = ready[len(said) :] if said else ready.lstrip()
            if piece:
                yield piece
                said = ready if said else text[: len(ready)]
    rest = answer_text(tokenizer, ids, strip=False).rstrip()[len(said) :]
    if rest.strip():
        yield rest if said else rest.lstrip()


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], strip: bool = True) -> str:
    """The text of answer tokens, without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip() if strip else text


@torch.no_grad()
def label_log_likelihoods(reading: Reading, labels: Sequence[Sequence[int]]) -> Tensor:
    """Log-likelihood of each label as the whole answer to the prompt of `reading` (one row).

    Args:
        reading: one prompt with its picture.
        labels: token ids of each label, ending with the end-of-turn token, so that "a red star"
            is not a mere beginning of a longer answer.

    Returns:
        [len(labels)] float64 on the CPU: the sum over each label's tokens, not divided by length.
    """
    chunks = [labels[k : k + LABELS_AT_ONCE] for k in range(0, len(labels), LABELS_AT_ONCE)]
    return torch.cat([_chunk_log_likelihoods(reading, chunk) for chunk in chunks])


def _chunk_log_likelihoods(reading: Reading, labels: Sequence[Sequence[int]]) -> Tensor:
    width = max(len(label) for label in labels)
    device = reading.mask.device
    # Padding on the right: real tokens never attend to it, and its own scores are masked out.
    ids = torch.tensor([[*label, *[0] * (width - len(label))] for label in labels], device=device)
    real = torch.tensor([[k < len(label) for k in range(width)] for label in labels], device=device)
    branch = reading.copies(len(labels))
    logits = branch.next_logits[:, None]
    if width > 1:
        logits = torch.cat([logits, branch.extend(ids[:, :-1])], dim=1)
    scores = logits.double().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return (scores * real).sum(-1).cpu()
