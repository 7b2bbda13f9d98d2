"""Recipes 2 and 3: from CLIP features back to pixels.

Stage 1 trains `clip_down` and the decoder under a frozen vision tower. Stage 2 trains all of them
together; self-distillation holds the projected features to those of the frozen starting point, so
that what the LM understands does not degrade (specs of UniLIP, section 7.1).

    loss = mse + 0.5 l1 + edges + moments (+ distill * mse(features, frozen features))

Pictures count in [0, 1]. "edges" compares the differences of neighboring pixels. "moments" pulls
each latent channel to mean 0 and deviation 1 over a batch, so that one factor fits all channels.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clipflow.models.unilip import UniLIPModel
from clipflow.models.unilip.vision import pixel_shuffle
from clipflow.scenes import random_scene, sample_prompted_scene
from clipflow.scenes.prompts import TAGS
from clipflow.training.recipe import Recipe
from clipflow.training.stages.scene_data import pixel_values

MOMENTS_WEIGHT = 0.01


class Reconstruction:
    """Options: `joint` (train the vision side too), `distill` (weight), `noise`.

    `noise` is the deviation of the normal noise put on the latents in training: the decoder then
    also draws well from the slightly wrong latents that a sampler makes.
    """

    def setup(
        self, model: UniLIPModel, recipe: Recipe, workdir: Path, device: torch.device
    ) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.images_per_batch = recipe.batch_size
        self.joint = recipe.options.get("joint", False)
        self.distill = recipe.options.get("distill", 1.0)
        self.noise = recipe.options.get("noise", 0.0)
        self.teacher = self._teacher(model) if self.joint else None
        mean, std = (torch.tensor(v, device=device) for v in _statistics(model))
        self.to_unit = lambda pixels: pixels * std[:, None, None] + mean[:, None, None]

    def batch(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.recipe.seed, 2, step])
        scenes = []
        for index in range(self.recipe.batch_size):
            if index % 4 == 0:
                scenes.append(random_scene(rng))
            else:
                scenes.append(sample_prompted_scene(rng, TAGS[rng.integers(len(TAGS))])[1])
        return pixel_values(scenes, rng, self.model.config)

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch.to(self.device)
        with torch.set_grad_enabled(self.joint):
            features = self.model.encode_image(pixels)
        latents = self.model.clip_down(features)
        noisy = latents + self.noise * torch.randn_like(latents)
        drawn = (self.model.decode(noisy) + 1) / 2
        loss, mse = picture_loss(drawn, self.to_unit(pixels))
        loss = loss + MOMENTS_WEIGHT * moments(latents)
        metrics = {"psnr": -10 * torch.log10(mse.detach())}
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher.encode(pixels)
            drift = F.mse_loss(features, wanted)
            loss = loss + self.distill * drift
            metrics["drift"] = drift.detach()
        return loss, metrics

    @staticmethod
    def _teacher(model: UniLIPModel) -> _Teacher:
        return _Teacher(model)


class _Teacher:
    """The vision tower and projector as they were before stage 2."""

    def __init__(self, model: UniLIPModel) -> None:
        self.tower = copy.deepcopy(model.vision_tower).eval().requires_grad_(False)
        self.projector = copy.deepcopy(model.multi_modal_projector).eval().requires_grad_(False)

    def encode(self, pixels: Tensor) -> Tensor:
        patches = self.tower(pixels)[:, 1:]
        return self.projector(pixel_shuffle(patches, self.tower.config.shuffle))


def picture_loss(drawn: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error) of pictures [B, 3, S, S] in [0, 1]."""
    mse = F.mse_loss(drawn, wanted)
    error = drawn - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return mse + 0.5 * error.abs().mean() + 0.5 * edges, mse


def moments(latents: Tensor) -> Tensor:
    """How far the channels of [B, C, h, w] are from mean 0 and deviation 1."""
    mean = latents.mean(dim=(0, 2, 3))
    deviation = latents.std(dim=(0, 2, 3))
    return (mean.square() + (deviation - 1).square()).mean()


def _statistics(model: UniLIPModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return model.config.image_mean, model.config.image_std


STAGE = Reconstruction
