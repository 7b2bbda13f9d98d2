"""The learning rate over a run: a linear warm-up, then a cosine down to a floor.

A run ends by steps or by minutes, whichever comes first, so the cosine follows `progress`: the
larger of the two fractions. It reaches its floor exactly when the run ends, on any machine.
"""

import math


def progress(step: int, steps: int, elapsed: float, minutes: float | None) -> float:
    """How much of the run is over, in [0, 1].

    Args:
        step: optimizer steps done.
        steps: optimizer steps in the whole run.
        elapsed: seconds trained so far, over all pieces of the run.
        minutes: wall-clock cap, or None for none. Then the result depends on `step` alone.
    """
    done = step / steps
    if minutes is not None:
        done = max(done, elapsed / (60 * minutes))
    return min(done, 1.0)


def lr_ratio(step: int, done: float, *, warmup_steps: int, min_lr_ratio: float) -> float:
    """The factor on the recipe's learning rate for the step after `step` finished ones.

    Args:
        step: optimizer steps done; the first step of a run has 0.
        done: `progress` of the run, in [0, 1].
        warmup_steps: steps over which the factor rises linearly; 0 for none.
        min_lr_ratio: the factor at the end of the run.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return warmup * (min_lr_ratio + (1 - min_lr_ratio) * cosine)
