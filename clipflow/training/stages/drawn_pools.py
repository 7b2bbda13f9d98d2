"""Pools of what is to be drawn: pictures are encoded once by the frozen parts, and kept."""

# Shape suffixes: N = pictures, C = latent channels, H = width of features.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clipflow.models.blip3o.model import BLIP3oModel
from clipflow.models.unilip import UniLIPModel
from clipflow.scenes import Scene, draw_scene, make_prompt, plain_form, render_batch, sample_edit
from clipflow.scenes.world import Dice
from clipflow.training.stages.scene_data import normalize

ENCODE_BATCH = 128


class Pool(NamedTuple):
    """What is drawn: texts, their targets, and for edits the features of the picture before."""

    texts: list[str]
    meanings: list[str]  # of the texts, in plain words
    latents: Tensor  # [N, C, h, w], as the DiT draws them
    targets: Tensor | None  # [N, tokens, H] float16, features that the latents are made of
    features: Tensor | None = None  # [N, tokens, H] float16
    teacher_features: Tensor | None = None  # the same as a teacher sees them


def prompted_pool(
    model: nn.Module,
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
    return Pool(texts, meanings, *drawn_codes(model, scenes, rng, device))


def edited_pool(
    model: nn.Module,
    rng: np.random.Generator,
    count: int,
    device: torch.device,
    teacher: UniLIPModel | None = None,
) -> Pool:
    """`count` edits: the features of the picture before, the latents of the one after."""
    edits = [sample_edit(rng) for _ in range(count)]
    befores, texts, afters = zip(*edits, strict=True)
    readers = [reader for reader in (model, teacher) if reader is not None]
    features = seen_features(readers, befores, rng, device)
    codes = drawn_codes(model, afters, rng, device)
    return Pool(list(texts), list(texts), *codes, *features)


@torch.no_grad()
def seen_features(
    readers: Sequence[nn.Module],
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    device: torch.device,
) -> list[Tensor]:
    """Features [N, tokens, H] float16 of the same pictures, as each of `readers` sees them."""
    features: list[list[Tensor]] = [[] for _ in readers]
    for start in range(0, len(scenes), ENCODE_BATCH):
        pictures = torch.from_numpy(render_batch(scenes[start : start + ENCODE_BATCH], rng))
        for reader, found in zip(readers, features, strict=True):
            seen = reader.encode_image(normalize(pictures, reader.config).to(device))
            found.append(seen.cpu().half())
    return [torch.cat(found) for found in features]


@torch.no_grad()
def drawn_codes(
    model: nn.Module, scenes: Sequence[Scene], rng: np.random.Generator, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(latents as the DiT draws them [N, C, h, w], features that they are made of or None)."""
    latents, features = [], []
    for start in range(0, len(scenes), ENCODE_BATCH):
        pictures = torch.from_numpy(render_batch(scenes[start : start + ENCODE_BATCH], rng))
        pixels = normalize(pictures, model.config).to(device)
        if isinstance(model, BLIP3oModel):
            latents.append(model.clip_target.target(pixels).cpu())
        else:
            seen = model.encode_image(pixels)
            latents.append((model.clip_down(seen) * model.config.unilip_factor).cpu())
            features.append(seen.cpu().half())
    return torch.cat(latents), torch.cat(features) if features else None
