"""Recipes 4 and 5: queries, connector and DiT learn to draw and to edit by flow matching.

    z = clip_down(features) * unilip_factor,  loss = | DiT(z_s, s, condition) - (noise - z) |^2

Vision tower, projector, LM, `clip_down` and decoder are frozen (specs of UniLIP, section 7.2), so
the pool of pictures is encoded once and kept in memory. Each condition is used for several noises.
"""

# Shape suffixes: B = conditions, K = noises for each, C = latent channels.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipflow.models.unilip import UniLIPModel
from clipflow.sampling.flow_matching import draw_times, flow_matching_loss, interpolate
from clipflow.scenes import Scene, draw_scene, make_prompt, plain_form, sample_edit
from clipflow.scenes.world import Dice
from clipflow.training.recipe import Recipe
from clipflow.training.stages.alignment import Alignment
from clipflow.training.stages.naming import QueryNaming
from clipflow.training.stages.scene_data import SceneText, pixel_values

FROZEN = ("vision_tower", "multi_modal_projector", "language_model", "vae_decoder")
ENCODE_BATCH = 128
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


class Pool(NamedTuple):
    """What is drawn: texts, their targets, and for edits the features of the picture before."""

    texts: list[str]
    meanings: list[str]  # of the texts, in plain words
    latents: Tensor  # [N, C, h, w], times unilip_factor
    targets: Tensor  # [N, tokens, H] float16, the features that the latents are made of
    features: Tensor | None = None  # [N, tokens, H] float16


class Batch(NamedTuple):
    """Token rows, the words they mean, features for edits, the clean latents and their features."""

    input_ids: Tensor
    attention_mask: Tensor
    words: Tensor
    features: Tensor | None
    latents: Tensor
    targets: Tensor


class Generation:
    """Options.

    `pictures`, `edits`: pool sizes. `edit_share`: share of steps that train editing.
    `noises`: K. `tags`: how often each kind of prompt comes. `dropout`: share of null conditions.
    `time_mean`, `time_std`: of the logit-normal times; `shift`: of the training times.
    `alignment`: weight of the representation alignment at block `alignment_depth`; it falls to 0
    by the share `alignment_until` of the recipe's steps, when details matter more.
    `naming`: weight of the loss that has the queries say the prompt's meaning.
    """

    def setup(
        self, model: UniLIPModel, recipe: Recipe, workdir: Path, device: torch.device
    ) -> None:
        options = recipe.options
        self.model, self.recipe, self.device = model, recipe, device
        self.text = SceneText(model.config)
        self.noises = options.get("noises", 2)
        self.dropout = options.get("dropout", 0.1)
        self.edit_share = options.get("edit_share", 0.0)
        self.times = {
            "mean": options.get("time_mean", 0.0),
            "std": options.get("time_std", 1.0),
            "shift": options.get("shift", 1.0),
        }
        self.images_per_batch = recipe.batch_size * self.noises
        for name in FROZEN:
            getattr(model, name).eval()
        rng = np.random.default_rng([recipe.seed, 4])
        tags = options.get("tags", DEFAULT_TAGS)
        self.pictures = prompted_pool(model, rng, options.get("pictures", 40_000), tags, device)
        edits = options.get("edits", 0)
        self.edits = edited_pool(model, rng, edits, device) if edits else None
        self.naming_weight = options.get("naming", 0.3)
        self.naming = QueryNaming(model, self.text)
        self.alignment_weight = options.get("alignment", 0.5)
        self.alignment_steps = options.get("alignment_until", 0.7) * recipe.steps
        self.alignment = Alignment(
            model.dit, options.get("alignment_depth", 3), self.pictures.targets[:ENCODE_BATCH]
        )

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.recipe.seed, 5, step])
        editing = self.edits is not None and rng.random() < self.edit_share
        pool = self.edits if editing else self.pictures
        chosen = rng.integers(len(pool.texts), size=self.recipe.batch_size)
        write = self.text.prompts.edit if editing else self.text.prompts.text_to_image
        dropped = rng.random(len(chosen)) < self.dropout
        asked = [None if drop else pool.texts[i] for i, drop in zip(chosen, dropped, strict=True)]
        texts = [write(text) for text in asked]
        meant = [
            None if drop else pool.meanings[i] for i, drop in zip(chosen, dropped, strict=True)
        ]
        ids, mask = left_padded([self.text.ids(text) for text in texts], self.text.pad)
        chosen = torch.from_numpy(chosen)
        features = pool.features[chosen].float() if editing else None
        targets = pool.targets[chosen].float()
        return Batch(ids, mask, self.naming.labels(meant), features, pool.latents[chosen], targets)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = Batch(*(None if t is None else t.to(self.device) for t in batch))
        condition = self.model.encode_condition(
            batch.input_ids, batch.attention_mask, batch.features
        )
        words = self.naming.loss(self.model, batch.words)
        K = self.noises
        latents = batch.latents.repeat(K, 1, 1, 1)
        times = draw_times(len(latents), device=self.device, **self.times)
        noisy, target = interpolate(latents, torch.randn_like(latents), times.sigmas)
        velocity = self.model.dit(
            noisy,
            times.timesteps.clamp(max=999),
            condition.hidden.repeat(K, 1, 1),
            condition.mask.repeat(K, 1),
        )
        flow = flow_matching_loss(velocity, target)
        alignment = self.alignment.loss(batch.targets.repeat(K, 1, 1))
        kind = "draw" if batch.features is None else "edit"
        metrics = {kind: flow.detach(), "alignment": alignment.detach(), "words": words.detach()}
        weight = self.alignment_weight * max(0.0, 1 - step / self.alignment_steps)
        return flow + weight * alignment + self.naming_weight * words, metrics


def prompted_pool(
    model: UniLIPModel,
    rng: np.random.Generator,
    count: int,
    tags: dict[str, float],
    device: torch.device,
) -> Pool:
    """`count` prompts, each with the latents of one scene it is true of."""
    names = list(tags)
    shares = np.array([tags[name] for name in names], dtype=float)
    drawn = rng.choice(len(names), size=count, p=shares / shares.sum())
    prompts, scenes = [], []
    for index in drawn:
        dice = Dice(rng)
        prompts.append(make_prompt(dice, names[index], seen=True))
        scenes.append(draw_scene(dice, prompts[-1]))
    texts, meanings = [p.text for p in prompts], [plain_form(p) for p in prompts]
    return Pool(texts, meanings, *encoded(model, scenes, rng, device))


def edited_pool(
    model: UniLIPModel, rng: np.random.Generator, count: int, device: torch.device
) -> Pool:
    """`count` edits: the features of the picture before, the latents of the one after."""
    edits = [sample_edit(rng) for _ in range(count)]
    befores, texts, afters = zip(*edits, strict=True)
    _, features = encoded(model, befores, rng, device)
    return Pool(list(texts), list(texts), *encoded(model, afters, rng, device), features)


@torch.no_grad()
def encoded(
    model: UniLIPModel, scenes: Sequence[Scene], rng: np.random.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(latents times unilip_factor [N, C, h, w], features [N, tokens, H] float16), fresh."""
    latents, features = [], []
    for start in range(0, len(scenes), ENCODE_BATCH):
        chunk = scenes[start : start + ENCODE_BATCH]
        seen = model.encode_image(pixel_values(chunk, rng, model.config).to(device))
        latents.append((model.clip_down(seen) * model.config.unilip_factor).cpu())
        features.append(seen.cpu().half())
    return torch.cat(latents), torch.cat(features)


def left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B, T] of token rows, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


STAGE = Generation
