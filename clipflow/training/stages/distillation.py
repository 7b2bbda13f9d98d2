"""Velocities of the finished UniLIP-scenes, for a BLIP3-o that draws its latents among others.

The first channels of the features that a scenes BLIP3-o draws are UniLIP's latents, 2 x 2 of them
at a place, and noise is noise in either order; so what UniLIP would do with the noisy picture is
known. Its velocity is the mean of all that may be meant: without the spread of single pictures, a
small model learns it from far fewer of them.

Source: Salimans and Ho, "Progressive Distillation" (2022), without fewer steps.
"""

# Shape suffixes: B = pictures, C = channels that both draw, h, w = the student's grid.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clipflow.models.condition import Condition
from clipflow.models.unilip import UniLIPModel
from clipflow.training.stages.scene_data import SceneText, left_padded

LAST_TIMESTEP = 999  # that UniLIP was trained with


class Distillation:
    """The teacher's side of a batch."""

    def __init__(self, teacher: UniLIPModel) -> None:
        self.teacher, self.text = teacher, SceneText(teacher.config)
        self.channels = 4 * teacher.config.decoder.latent_channels

    def rows(self, asked: Sequence[str | None], editing: bool) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of the prompts as the teacher reads them."""
        prompts = self.text.prompts
        write = prompts.edit if editing else prompts.text_to_image
        return left_padded([self.text.ids(write(text)) for text in asked], self.text.pad)

    @torch.no_grad()
    def condition(self, ids: Tensor, mask: Tensor, features: Tensor | None) -> Condition:
        return self.teacher.encode_condition(ids, mask, features)

    @torch.no_grad()
    def velocity(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """[B, C, h, w] of the student's noisy features; `condition` is repeated to fill B."""
        times = len(noisy) // len(condition.hidden)
        found = self.teacher.dit(
            F.pixel_shuffle(noisy[:, : self.channels], 2),
            timesteps.clamp(max=LAST_TIMESTEP),
            condition.hidden.repeat(times, 1, 1),
            condition.mask.repeat(times, 1),
        )
        return F.pixel_unshuffle(found, 2)
