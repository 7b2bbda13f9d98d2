"""Image tokens drawn one by one from the language model, whose states are kept on the way.

The reference draws with one loop and reads prompt and tokens a second time for their states. Here a
token's state is kept when it is read, so that only the last token costs one more step.
"""

# Shape suffixes: B = rows, T = prompt tokens, L = selected positions, H = LM width, V = tokens to
# choose from.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from clipflow.errors import ShapeError
from clipflow.models.blip3o_next.token_steps import FixedSteps, Steps, takes_fixed_steps
from clipflow.models.language.kept_keys import KeptKeys
from clipflow.models.language.layers import rope_table
from clipflow.models.language.token_sampling import TokenSampling

if TYPE_CHECKING:
    from clipflow.models.blip3o_next.model import BLIP3oNextModel


class DrawnTokens(NamedTuple):
    """What was drawn after each prompt.

    Attributes:
        tokens: ids, [B, n] int64; pad behind the end of a row that ended early.
        hidden: final states from the position after `<im_start>` on, prompt's and drawn tokens',
            [B, L, H].
        mask: [B, L] bool, true where a state is real.
    """

    tokens: Tensor
    hidden: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class TokenDraw:
    """How tokens are drawn.

    Attributes:
        sampling: from the logits.
        dice: a generator on the CPU for each row.
        count: how many tokens at most.
        allow_any_token: draw from the whole vocabulary, and end a row early at a token that ends a
            text; otherwise from the image tokens alone.
        progress: called with 1 after each token of all rows.
    """

    sampling: TokenSampling
    dice: Sequence[torch.Generator]
    count: int
    allow_any_token: bool = False
    progress: Callable[[int], object] | None = None


@torch.no_grad()
def draw_image_tokens(
    model: BLIP3oNextModel, input_ids: Tensor, attention_mask: Tensor, draw: TokenDraw
) -> DrawnTokens:
    """Draw the image tokens that follow prompts.

    Args:
        model: whose language model draws.
        input_ids: [B, T], padded on either side; each row has an `<im_start>`.
        attention_mask: [B, T], 1 where a token is real.
        draw: how.

    Raises:
        ShapeError: a prompt has no `<im_start>`.
        SamplingError: a logit is not finite.
    """
    lm, tokens = model.language_model, model.config.tokens
    lengths = attention_mask.sum(-1)
    # Real tokens first: then causal attention by itself keeps them from seeing the padding.
    ids = input_ids.gather(1, attention_mask.argsort(dim=-1, descending=True, stable=True))
    begins = _begins(ids, lengths, tokens.image_start)
    rows, T = torch.arange(len(ids), device=ids.device), ids.shape[1]
    cos, sin = rope_table(lm.rotary_emb, torch.arange(T + draw.count, device=ids.device))
    kept = KeptKeys(lm)
    given = kept.begin(lm.embed_tokens(ids), (cos[:T], sin[:T]), room=draw.count, lengths=lengths)
    selected = _Selected(given, begins, lengths, room=draw.count)
    kind = FixedSteps if takes_fixed_steps(ids.device) else Steps
    steps = kind(model, kept, (cos, sin), draw.allow_any_token)
    logits, going = steps.logits_of(given[rows, lengths - 1]), torch.ones_like(rows).bool()
    drawn = []
    for _ in range(draw.count):
        chosen = draw.sampling.choose(logits.float(), draw.dice) + steps.first
        chosen = torch.where(going, chosen, tokens.pad)
        drawn.append(chosen)
        states, logits = steps.take(chosen)
        selected.add(states, going)
        if draw.progress is not None:
            draw.progress(1)
        if draw.allow_any_token:
            going = going & ~torch.isin(chosen, torch.tensor(tokens.eos, device=chosen.device))
            if not bool(going.any()):
                break
    return DrawnTokens(torch.stack(drawn, dim=1), *selected.states())


class _Selected:
    """States of the selected positions, each row's from its own beginning on."""

    def __init__(self, given: Tensor, begins: Tensor, lengths: Tensor, *, room: int) -> None:
        """`given` [B, T, H] of prompts of `lengths` [B]; those from `begins` [B] on are taken."""
        self._lengths = lengths - begins
        B, T, H = given.shape
        self._rows = torch.arange(B, device=given.device)
        most = int(self._lengths.max())
        places = (begins[:, None] + torch.arange(most, device=given.device)).clamp(max=T - 1)
        self._states = given.new_zeros(B, most + room, H)
        self._states[:, :most] = given[self._rows[:, None], places]

    def add(self, states: Tensor, going: Tensor) -> None:
        """One state [B, H] more in each row that is `going` [B] bool."""
        # Of a row that has ended the place behind its end is written over and over, and masked.
        self._states[self._rows, self._lengths] = states
        self._lengths = self._lengths + going

    def states(self) -> tuple[Tensor, Tensor]:
        """(states [B, L, H], mask [B, L])."""
        longest = int(self._lengths.max())
        mask = torch.arange(longest, device=self._lengths.device) < self._lengths[:, None]
        return self._states[:, :longest], mask


def _begins(ids: Tensor, lengths: Tensor, image_start: int) -> Tensor:
    """[B], the position after the first `<im_start>` of each row."""
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    found = (ids == image_start) & real
    if not bool(found.any(-1).all()):
        rows = (~found.any(-1)).nonzero()[:, 0].tolist()
        raise ShapeError(
            f"image tokens: every prompt must have the token {image_start} (<im_start>), "
            f"got none in rows {rows}"
        )
    return found.int().argmax(-1) + 1
