"""Activations of one evaluation of a transformer, allocated once."""

# Shape suffixes: R = rows, N = image tokens, D = channels, C = channels of the velocity.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Buffers:
    """What the ops of a block write to; two of them serve several ops that never overlap in time.

    Attributes:
        hidden: the residual stream, [R, N, D].
        normed: its modulated norm, [R, N, D].
        branch: what a branch adds to the stream, [R, N, D].
        velocity: of the latents, [R, C, N].
        shared_wide: what packed projections give: q, k and v, and behind them normed q and k;
            cross-attention's queries, and behind them the normed ones; both halves of the
            feed-forward.
        shared_middle: what is made of that: mixed values; the gated half of the feed-forward.
    """

    hidden: Tensor
    normed: Tensor
    branch: Tensor
    velocity: Tensor
    shared_wide: Tensor
    shared_middle: Tensor

    @classmethod
    def empty(
        cls,
        rows: int,
        tokens: int,
        channels: int,
        *,
        wide: int,
        middle: int,
        out_channels: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Buffers:
        """Buffers for R = `rows`, N = `tokens`, D = `channels` and C = `out_channels`.

        Args:
            wide, middle: most channels that the shared buffers are asked for.
        """
        kind = {"dtype": dtype, "device": device}
        stream = (rows, tokens, channels)
        return cls(
            *(torch.empty(stream, **kind) for _ in range(3)),
            velocity=torch.empty(rows, out_channels, tokens, **kind),
            shared_wide=torch.empty(rows, tokens * wide, **kind),
            shared_middle=torch.empty(rows, tokens * middle, **kind),
        )

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in vars(self).values())

    def of_rows(self, rows: int) -> Buffers:
        """The first `rows` rows of all buffers."""
        return Buffers(**{name: buffer[:rows] for name, buffer in vars(self).items()})

    def wide(self, width: int) -> Tensor:
        """The shared buffer as [R * N, width]."""
        return self._shared(self.shared_wide, width)

    def behind(self, width: int, *widths: int) -> list[Tensor]:
        """The places behind [R * N, `width`] in that buffer, [R * N, w] of each w in `widths`."""
        tokens = self.hidden.shape[0] * self.hidden.shape[1]
        free = self.shared_wide.flatten()[tokens * width : tokens * (width + sum(widths))]
        parts = free.split([tokens * w for w in widths])
        return [part.view(tokens, w) for part, w in zip(parts, widths, strict=True)]

    def middle(self, width: int) -> Tensor:
        """The other shared buffer as [R * N, width]."""
        return self._shared(self.shared_middle, width)

    def _shared(self, buffer: Tensor, width: int) -> Tensor:
        tokens = self.hidden.shape[0] * self.hidden.shape[1]
        return buffer.flatten()[: tokens * width].view(tokens, width)
