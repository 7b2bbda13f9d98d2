"""Representation alignment: a middle layer of the DiT is held to the clean picture's features.

    loss = 1 - cosine(P h, standardized features),   P a fixed random orthogonal map

What is to be drawn is known to the vision tower already; a DiT told so early on learns sooner what
stands where than from velocities alone. Source: Yu et al., "Representation Alignment for
Generation" (2024); there P is trained.
"""

# Shape suffixes: B = samples, N = image tokens, D = width of the DiT, H = width of the features.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.models.dits.sana import SanaTransformer


class Alignment:
    """Reads a block of `dit` as it runs, and compares with `features` of the same grid.

    Args:
        dit: one image token for each feature; what its `depth`-th block (1-based, not the last)
            hands on is read.
        examples: features [M, N, H] whose mean and deviation standardize all others.
    """

    def __init__(self, dit: SanaTransformer, depth: int, examples: Tensor) -> None:
        width, wanted = dit.config.hidden_size, examples.shape[-1]
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.empty(wanted, width)
        nn.init.orthogonal_(self.projection, generator=generator)
        examples = examples.float().flatten(0, 1)
        self.mean, self.std = examples.mean(0), examples.std(0).clamp(min=1e-6)
        self.hidden: Tensor | None = None
        dit.transformer_blocks[depth].register_forward_pre_hook(self._keep)

    def loss(self, features: Tensor) -> Tensor:
        """Of the DiT's last forward pass; `features` [B, N, H] of its clean pictures."""
        if self.hidden is None:
            raise RuntimeError("alignment: the DiT must run before its loss is asked")
        hidden, self.hidden = self.hidden, None
        device = hidden.device
        wanted = (features - self.mean.to(device)) / self.std.to(device)
        said = F.linear(hidden, self.projection.to(device))
        return 1 - F.cosine_similarity(said, wanted, dim=-1).mean()

    def _keep(self, following: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.hidden = args[0]
