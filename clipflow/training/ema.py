"""The exponential moving average of the trained parameters: what a finished stage ships."""

from collections.abc import Mapping

import torch
from torch import Tensor


def ramped_decay(decay: float, updates: int) -> float:
    """The decay after `updates` updates: min(decay, (1 + n) / (10 + n)).

    Early weights are far from the final ones; the ramp forgets them quickly.
    """
    return min(decay, (1 + updates) / (10 + updates))


class EMA:
    """Averages of named parameters; starts as a copy of them."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the averages towards the parameters; `updates` is the number of earlier calls."""
        weight = 1 - ramped_decay(self.decay, updates)
        torch._foreach_lerp_(
            list(self.averages.values()), [p.detach() for p in self.parameters.values()], weight
        )

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take over averages written by an earlier run.

        Raises:
            ValueError: the names are not those of the parameters averaged here.
        """
        if set(averages) != set(self.averages):
            differing = sorted(set(averages) ^ set(self.averages))
            raise ValueError(
                f"EMA: names must be those of the trained parameters, got {len(differing)} "
                f"differing: {', '.join(differing[:5])}"
            )
        for name, average in averages.items():
            self.averages[name].copy_(average)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the parameters with their averages."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])
