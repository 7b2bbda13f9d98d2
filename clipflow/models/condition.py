"""What the diffusion transformer of any family attends to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Condition(NamedTuple):
    """`hidden` [B, L, C], as wide as the DiT reads, and `mask` [B, L] bool, true where real."""

    hidden: Tensor
    mask: Tensor
