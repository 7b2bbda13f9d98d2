"""The finished scenes model that others of its world start from, and what it knows of pictures."""

# Shape suffixes: B = pictures, N = features of one, H = their width, C = latent channels.

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipflow.models.unilip import UniLIPModel
from clipflow.scenes import Scene, random_scene, render_batch, sample_prompted_scene
from clipflow.scenes.prompts import TAGS
from clipflow.training.stages.scene_data import normalize

ENCODE_BATCH = 128


def teacher_folder() -> Path:
    """The folder of the embedded UniLIP-scenes."""
    return Path(str(resources.files("clipflow"))) / "assets" / "scenes"


def load_teacher(device: torch.device | str = "cpu") -> UniLIPModel:
    """The embedded UniLIP-scenes, frozen."""
    model = UniLIPModel.from_pretrained(teacher_folder(), device=device)
    return model.eval().requires_grad_(False)


class Lessons(NamedTuple):
    """Pictures [M, S, S, 3] uint8 and what the teacher makes of them, float16.

    `features` [M, N, H] are those its language model reads, `latents` [M, C, h, w] those it draws.
    """

    pictures: Tensor
    features: Tensor
    latents: Tensor


def picture_lessons(
    teacher: UniLIPModel, count: int, rng: np.random.Generator, cache: Path
) -> Lessons:
    """`count` pictures, seen by the teacher; read from the folder `cache` where it has them."""
    path = cache / f"lessons-{count}.safetensors"
    if path.is_file():
        return Lessons(**load_file(path))
    pictures = torch.from_numpy(render_batch([mixed_scene(rng, i) for i in range(count)], rng))
    features, latents = see(teacher, pictures)
    lessons = Lessons(pictures, features, latents.contiguous())
    beside = path.with_suffix(".tmp")
    save_file(lessons._asdict(), beside)
    beside.replace(path)
    return lessons


def mixed_scene(rng: np.random.Generator, index: int) -> Scene:
    """One of four is any scene, the others are of prompts."""
    if index % 4 == 0:
        return random_scene(rng)
    return sample_prompted_scene(rng, TAGS[rng.integers(len(TAGS))])[1]


@torch.no_grad()
def see(teacher: UniLIPModel, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(features [B, N, H], latents [B, C, h, w]), float16, of pictures [B, S, S, 3] uint8."""
    features, latents = [], []
    for part in pictures.split(ENCODE_BATCH):
        seen = teacher.encode_image(normalize(part, teacher.config))
        features.append(seen.half())
        latents.append((teacher.clip_down(seen) * teacher.config.unilip_factor).half())
    return torch.cat(features), torch.cat(latents)


def standardizer(examples: Sequence[Tensor] | Tensor) -> Callable[[Tensor], Tensor]:
    """What gives each of the last dimension's channels the mean 0 and deviation 1 of `examples`."""
    rows = examples.float().flatten(0, -2)
    mean, std = rows.mean(0), rows.std(0).clamp(min=1e-6)
    return lambda values: (values - mean.to(values.device)) / std.to(values.device)
