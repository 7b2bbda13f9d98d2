"""One image token read: the states and logits of what follows, by new slices or by one graph."""

# Shape suffixes: B = rows, S = positions, H = LM width, K = width of a head, V = tokens to choose
# from.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipflow.models.language.kept_keys import KeptKeys
from clipflow.models.language.layers import Rope
from clipflow.sampling.cuda_graphs import StepGraphs

if TYPE_CHECKING:
    from clipflow.models.blip3o_next.model import BLIP3oNextModel


class Steps:
    """Tokens read one after the other in all rows.

    Args:
        model: whose language model reads.
        kept: what it has read.
        table: (cos, sin) of all positions, [S, K/2] each.
        any_token: whether logits are of the whole vocabulary, or of the image tokens.

    Attributes:
        first: id of the token that the first logit is of.
    """

    def __init__(
        self, model: BLIP3oNextModel, kept: KeptKeys, table: Rope, any_token: bool
    ) -> None:
        self.logits_of = model.head if any_token else model.image_logits
        self.first = 0 if any_token else model.config.tokens.first_image
        self._embed, self._kept, self._table = model.language_model.embed_tokens, kept, table

    def take(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read `tokens` [B]: (final states [B, H], logits [B, V]); both until the next call."""
        states = self._kept.extend(self._embed(tokens[:, None]), self._rope())
        return states, self.logits_of(states)

    def _rope(self) -> Rope:
        cos, sin = self._table
        return cos[self._kept.lengths], sin[self._kept.lengths]


class FixedSteps(Steps):
    """The same as one CUDA graph: a step launches hundreds of kernels that take no time at all.

    Where there is no CUDA, the step that the graph would be of is run as it is.
    """

    def __init__(
        self, model: BLIP3oNextModel, kept: KeptKeys, table: Rope, any_token: bool
    ) -> None:
        super().__init__(model, kept, table, any_token)
        kept.lengths = kept.lengths.clone()  # counted in place
        begin = kept.lengths.clone()
        self._tokens = torch.zeros_like(begin)
        # Made by a step, so that they have its dtype; what it writes to the slots behind the
        # prompts, and the step that warms the graph up, the first real step writes again.
        self._states, self._logits = self._compute()
        kept.lengths.copy_(begin)
        self._graphs = StepGraphs(begin.device, self._write, warm_up=[0])
        if self._graphs.usable:
            self._graphs.prepare([range(1)])
            kept.lengths.copy_(begin)

    def take(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self._tokens.copy_(tokens)
        if self._graphs.usable:
            self._graphs.replay(range(1))
        else:
            self._write(0)
        return self._states, self._logits

    def _write(self, _: int) -> None:
        states, logits = self._compute()
        self._states.copy_(states)
        self._logits.copy_(logits)

    def _compute(self) -> tuple[Tensor, Tensor]:
        states = self._kept.advance(self._embed(self._tokens[:, None]), self._rope())
        return states, self.logits_of(states)


def takes_fixed_steps(device: torch.device) -> bool:
    """Whether steps are a graph: on a GPU. A CPU does better to look at no slot that is empty."""
    return device.type == "cuda"
