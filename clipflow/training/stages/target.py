"""The CLIP tower of a scenes BLIP3-o: it learns to see what the finished UniLIP-scenes sees.

    target [B, D, h, w] = (latents, 2 x 2 of them in the channels; directions of the features)

The first channels are the teacher's latents, from which its decoder draws pictures; the others are
random directions of the features that its language model reads, which say what stands where.
Every channel has mean 0 and deviation 1, or nearly so, as flow matching wants its data.
"""

# Shape suffixes: B = pictures, D = channels of a target, h, w = its grid.

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.training.blip3o_scenes import untrained
from clipflow.training.recipe import Recipe
from clipflow.training.stages.scene_data import normalize
from clipflow.training.teacher import Lessons, load_teacher, picture_lessons, standardizer


class Target:
    """Options: `pictures`, size of the pool; `meaning`, weight of the channels of features."""

    def setup(self, model: nn.Module, recipe: Recipe, workdir: Path, device: torch.device) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.images_per_batch = recipe.batch_size
        self.weight = recipe.options.get("meaning", 0.25)
        teacher, rng = load_teacher(), np.random.default_rng([recipe.seed, 6])
        self.pool = picture_lessons(teacher, recipe.options.get("pictures", 12_000), rng, workdir)
        self.wanted = wanted_targets(self.pool, model.config.target)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.recipe.seed, 7, step])
        chosen = rng.integers(len(self.wanted), size=self.recipe.batch_size)
        pixels = normalize(self.pool.pictures[chosen], self.model.config)
        return pixels, self.wanted[chosen].float()

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, wanted = (part.to(self.device) for part in batch)
        error = self.model.clip_target.target(pixels) - wanted
        count = drawn_channels(self.pool)
        drawn, meant = error[:, :count].square().mean(), error[:, count:].square().mean()
        return drawn + self.weight * meant, {"drawn": drawn.detach(), "meant": meant.detach()}


def drawn_channels(pool: Lessons) -> int:
    """How many channels of a target are latents."""
    return 4 * pool.latents.shape[1]


def wanted_targets(pool: Lessons, config: object) -> Tensor:
    """The targets [M, D, h, w] float16 of all pictures of `pool`, on half the teacher's grid."""
    drawn = F.pixel_unshuffle(pool.latents, 2)
    side, width = pool.latents.shape[-1], pool.features.shape[-1]
    rest = config.hidden_size - drawn.shape[1]
    directions = torch.empty(width, rest)
    nn.init.orthogonal_(directions, generator=torch.Generator().manual_seed(0))
    examples = pool.features[:512]
    standard = standardizer(examples)
    narrow = standardizer(standard(examples.float()) @ directions)
    meant = []
    for part in pool.features.split(512):
        said = narrow(standard(part.float()) @ directions)
        grid = said.transpose(1, 2).unflatten(2, (side, side))
        meant.append(F.avg_pool2d(grid, 2).half())
    meant = torch.cat(meant)
    scale = meant[:512].float().std(dim=(0, 2, 3), keepdim=True)
    return torch.cat([drawn, (meant / scale).half()], dim=1)


__all__ = ["STAGE", "Target", "untrained"]

STAGE = Target
