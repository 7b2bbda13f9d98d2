"""Drawing: queries and DiT (and UniLIP's connector) learn to draw and to edit by flow matching.

    loss = | DiT(x_s, s, condition) - (noise - x) |^2,   x = latents of UniLIP, features of BLIP3-o

Whatever else there is is frozen (specs of UniLIP, section 7.2; of BLIP3-o, A.11), so the pool of
pictures is encoded once and kept in memory. Each condition is used for several noises.
"""

# Shape suffixes: B = conditions, K = noises for each, C = latent channels.

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clipflow.sampling.flow_matching import draw_times, flow_matching_loss, interpolate
from clipflow.training.recipe import Recipe
from clipflow.training.stages.alignment import Alignment
from clipflow.training.stages.distillation import Distillation
from clipflow.training.stages.drawn_pools import ENCODE_BATCH, edited_pool, prompted_pool
from clipflow.training.stages.naming import QueryNaming
from clipflow.training.stages.scene_data import SceneText, left_padded
from clipflow.training.teacher import load_teacher

DEFAULT_TAGS = {
    "single_object": 1,
    "colors": 1,
    "counting": 3,
    "two_object": 2,
    "color_attr": 4,
    "position": 5,
    "background": 1,
    "reasoning": 3,
}


class Batch(NamedTuple):
    """Token rows, the words they mean, features for edits, the clean latents and their features.

    `dropped` [B] bool marks rows whose condition is the constant null, in families that have one.
    The last three are what a teacher reads.
    """

    input_ids: Tensor
    attention_mask: Tensor
    words: Tensor
    dropped: Tensor
    features: Tensor | None
    latents: Tensor
    targets: Tensor | None
    teacher_ids: Tensor | None = None
    teacher_mask: Tensor | None = None
    teacher_features: Tensor | None = None


class Generation:
    """Options.

    `pictures`, `edits`: pool sizes. `edit_share`: share of steps that train editing.
    `noises`: K. `tags`: how often each kind of prompt comes. `dropout`: share of null conditions.
    `time_mean`, `time_std`: of the logit-normal times; `shift`: of the training times.
    `alignment`: weight of the representation alignment at block `alignment_depth`; it falls to 0
    by the share `alignment_until` of the recipe's steps, when details matter more.
    `naming`: weight of the loss that has the queries say the prompt's meaning.
    `distill`: share of UniLIP-scenes' velocity in the target, where both draw the same channels;
    `meaning`: weight of the other channels.
    """

    def setup(self, model: nn.Module, recipe: Recipe, workdir: Path, device: torch.device) -> None:
        options = recipe.options
        self.model, self.recipe, self.device = model, recipe, device
        self.text = SceneText(model.config)
        self.noises = options.get("noises", 2)
        self.dropout = options.get("dropout", 0.1)
        self.has_null = model.null_condition() is not None
        self.edit_share = options.get("edit_share", 0.0)
        self.times = {
            "mean": options.get("time_mean", 0.0),
            "std": options.get("time_std", 1.0),
            "shift": options.get("shift", 1.0),
        }
        self.images_per_batch = recipe.batch_size * self.noises
        for part in model.children():
            part.train(any(p.requires_grad for p in part.parameters()))
        self.distill = options.get("distill", 0.0)
        self.meaning_weight = options.get("meaning", 1.0)
        self.teaching = Distillation(load_teacher(device)) if self.distill else None
        self._make_pools(options)
        self.naming_weight = options.get("naming", 0.3)
        self.naming = QueryNaming(model, self.text)
        self.alignment_weight = options.get("alignment", 0.5)
        self.alignment_steps = options.get("alignment_until", 0.7) * recipe.steps
        self.alignment = None
        if self.alignment_weight:
            depth, examples = options.get("alignment_depth", 3), self.pictures.targets
            self.alignment = Alignment(model.dit, depth, examples[:ENCODE_BATCH])

    def _make_pools(self, options: dict) -> None:
        rng = np.random.default_rng([self.recipe.seed, 4])
        tags, pictures = options.get("tags", DEFAULT_TAGS), options.get("pictures", 40_000)
        self.pictures = prompted_pool(self.model, rng, pictures, tags, self.device)
        edits, teacher = options.get("edits", 0), self.teaching and self.teaching.teacher
        self.edits = None
        if edits:
            self.edits = edited_pool(self.model, rng, edits, self.device, teacher)

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.recipe.seed, 5, step])
        editing = self.edits is not None and rng.random() < self.edit_share
        pool = self.edits if editing else self.pictures
        chosen = rng.integers(len(pool.texts), size=self.recipe.batch_size)
        write = self.text.prompts.edit if editing else self.text.prompts.text_to_image
        dropped = rng.random(len(chosen)) < self.dropout
        if editing and self.has_null:  # the same null as of drawing, which learns it
            dropped[:] = False
        asked = [None if drop else pool.texts[i] for i, drop in zip(chosen, dropped, strict=True)]
        texts = [write(text) for text in asked]
        meant = [
            None if drop else pool.meanings[i] for i, drop in zip(chosen, dropped, strict=True)
        ]
        ids, mask = left_padded([self.text.ids(text) for text in texts], self.text.pad)
        taught = self.teaching.rows(asked, editing) if self.teaching else (None, None)
        chosen = torch.from_numpy(chosen)
        features, targets, seen = (
            None if part is None else part[chosen].float()
            for part in (pool.features, pool.targets, pool.teacher_features)
        )
        words, dropped = self.naming.labels(meant), torch.from_numpy(dropped)
        latents = pool.latents[chosen]
        return Batch(ids, mask, words, dropped, features, latents, targets, *taught, seen)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = Batch(*(None if t is None else t.to(self.device) for t in batch))
        condition = self.model.encode_condition(
            batch.input_ids, batch.attention_mask, batch.features
        )
        words = self.naming.loss(self.model, batch.words) if self.naming_weight else 0.0
        hidden = condition.hidden
        if self.has_null:
            null = self.model.null_condition().to(hidden)
            hidden = torch.where(batch.dropped[:, None, None], null, hidden)
        K = self.noises
        latents = batch.latents.repeat(K, 1, 1, 1)
        times = draw_times(len(latents), device=self.device, **self.times)
        noisy, target = interpolate(latents, torch.randn_like(latents), times.sigmas)
        timesteps = times.timesteps if self.has_null else times.timesteps.clamp(max=999)
        mask = None if self.has_null else condition.mask.repeat(K, 1)
        velocity = self.model.dit(noisy, timesteps, hidden.repeat(K, 1, 1), mask)
        flow, metrics = self._flow_loss(velocity, target, noisy, times.timesteps, batch)
        loss = flow + self.naming_weight * words
        if self.alignment is not None:
            alignment = self.alignment.loss(batch.targets.repeat(K, 1, 1))
            weight = max(0.0, 1 - step / self.alignment_steps)
            loss = loss + self.alignment_weight * weight * alignment
            metrics["alignment"] = alignment.detach()
        if self.naming_weight:
            metrics["words"] = words.detach()
        return loss, metrics

    def _flow_loss(
        self, velocity: Tensor, target: Tensor, noisy: Tensor, timesteps: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kind = "draw" if batch.features is None else "edit"
        if self.teaching is None:
            flow = flow_matching_loss(velocity, target)
            return flow, {kind: flow.detach()}
        teaching, C = self.teaching, self.teaching.channels
        read = teaching.condition(batch.teacher_ids, batch.teacher_mask, batch.teacher_features)
        taught = teaching.velocity(noisy, timesteps, read)
        drawn = torch.lerp(target[:, :C], taught, self.distill)
        flow = flow_matching_loss(velocity[:, :C], drawn)
        meant = flow_matching_loss(velocity[:, C:], target[:, C:])
        with torch.no_grad():
            teachers = flow_matching_loss(taught, target[:, :C])
        metrics = {kind: flow.detach(), f"{kind}_meaning": meant.detach(), "teacher": teachers}
        return flow + self.meaning_weight * meant, metrics


STAGE = Generation
