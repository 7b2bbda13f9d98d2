"""How the next token is chosen from a language model's logits."""

# Shape suffixes: B = rows, V = vocabulary.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipflow.errors import InputError, SamplingError

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """Greedy at temperature 0; otherwise a draw from the likeliest tokens.

    The logits are divided by `temperature`, all but the `top_k` largest are left out, and of the
    rest all but the fewest that have the probability `top_p` together; ties at the border stay.

    Attributes:
        temperature: 0 takes the likeliest token always.
        top_p: in (0, 1]; 1 leaves nothing out.
        top_k: 0 leaves nothing out.
        repetition_penalty: logits of tokens that were read or said are divided by it where they
            are positive and multiplied where not, before all else; 1 changes nothing.

    Raises:
        InputError: a value out of range.

    Source: Fan et al., "Hierarchical Neural Story Generation" (2018), section 5.4, for top-k;
    Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), section 3.1, for top-p;
    Keskar et al., "CTRL" (2019), section 4.1, for the penalty.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise InputError(f"{name} must be a number, got {value!r}")
        if self.temperature < 0:
            raise InputError(f"temperature must be at least 0, got {self.temperature!r}")
        if self.repetition_penalty <= 0:
            raise InputError(f"repetition_penalty must be above 0, got {self.repetition_penalty!r}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        if not whole or self.top_k < 0:
            raise InputError(f"top_k must be a whole number of at least 0, got {self.top_k!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each token to be drawn: [B, V] float64, from `logits` [B, V]; not if greedy."""
        # The largest is taken off first, so that a tiny temperature divides no finite gap to nan.
        scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / self.temperature
        best = None
        if 0 < self.top_k < scaled.shape[-1]:
            best = scaled.topk(self.top_k)
            scaled = scaled.masked_fill(scaled < best.values[:, -1:], -math.inf)
        chances = scaled.softmax(-1)
        if self.top_p == 1:
            return chances
        # Of ties at the border of `top_k` one stands for all, so that what is left need not be
        # sorted again.
        if best is None:
            largest = chances.sort(-1, descending=True).values
        else:
            largest = chances.gather(-1, best.indices)
        before = largest.cumsum(-1) - largest  # what the likelier ones have together
        count = (before < self.top_p).sum(-1, keepdim=True).clamp(min=1)
        chances = chances.masked_fill(chances < largest.gather(-1, count - 1), 0)
        return chances / chances.sum(-1, keepdim=True)

    def penalized(self, logits: Tensor, known: Tensor) -> Tensor:
        """`logits` [B, V] with those of tokens that are `known` [B, V] bool made smaller."""
        penalty = self.repetition_penalty
        smaller = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(known, smaller, logits)

    def choose(
        self, logits: Tensor, dice: Sequence[torch.Generator], known: Tensor | None = None
    ) -> Tensor:
        """Tokens [B] from `logits` [B, V]; row i draws one number from `dice[i]`, unless greedy.

        `known` [B, V] bool are the tokens that were read or said, for the penalty; None is none.

        Raises:
            SamplingError: a logit is not finite.
        """
        if not bool(logits.isfinite().all()):
            raise SamplingError("the language model's logits are not finite")
        if known is not None:
            logits = self.penalized(logits, known)
        if self.greedy:
            return logits.argmax(-1)
        below = self.probabilities(logits).cumsum(-1)
        draws = [torch.rand((), generator=one, dtype=torch.float64) for one in dice]
        # In the order of the vocabulary: two tokens about as likely as each other do not swap.
        wanted = torch.stack(draws).to(logits.device)[:, None] * below[:, -1:]
        tokens = torch.searchsorted(below, wanted, right=True)[:, 0]
        # A draw rounded up to the sum takes the last token that can be drawn.
        last = (below < below[:, -1:]).sum(-1)
        return torch.minimum(tokens, last)


def row_dice(generator: Generators, rows: int) -> list[torch.Generator]:
    """A generator for each row on the CPU, so that a row's draws do not depend on the others'.

    Each is seeded by one draw: from its own of a list, else in turn from the one generator or
    PyTorch's global one.

    Raises:
        InputError: a list of another length.
    """
    if isinstance(generator, Sequence):
        if len(generator) != rows:
            raise InputError(
                f"generator must be one, or a list of {rows} (one for each conversation), "
                f"got a list of {len(generator)}"
            )
        sources = list(generator)
    else:
        sources = [generator] * rows
    return [torch.Generator().manual_seed(_seed(source)) for source in sources]


def _seed(source: torch.Generator | None) -> int:
    device = "cpu" if source is None else source.device
    return int(torch.randint(2**62, (), generator=source, device=device))
