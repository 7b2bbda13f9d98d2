"""A toy model and stage for the training tests, and a run of them that kills itself.

Run: python training_toy.py OUT "in a step" | "in a checkpoint"
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from clipflow.training import checkpoint
from clipflow.training.loop import fit
from clipflow.training.recipe import Recipe


class ToyModel(nn.Module):
    """Everything a checkpoint must carry: a buffer, dropout's generator, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 6)
        self.tied = nn.Linear(6, 16)
        self.tied.weight = self.body[0].weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + self.tied(x))

    def save_pretrained(self, folder: Path) -> None:
        save_model(self, str(Path(folder) / "model.safetensors"))
        (Path(folder) / "config.json").write_text("{}")


class ToyStage:
    """Reconstruct noisy vectors. `before_step` may look at every step, or end the process."""

    images_per_batch = 8

    def __init__(self, before_step=lambda step: None) -> None:
        self.before_step = before_step

    def setup(self, model, recipe, workdir, device) -> None:
        self.model, self.seed = model, recipe.seed

    def batch(self, step: int) -> Tensor:
        generator = np.random.default_rng([self.seed, step])
        return torch.from_numpy(generator.standard_normal((8, 6), dtype=np.float32))

    def loss(self, batch: Tensor, step: int):
        self.before_step(step)
        noise = 0.1 * torch.randn(batch.shape) + float(np.random.standard_normal()) * 0.01
        loss = (self.model(batch + noise) - batch).square().mean()
        return loss, {"noise": noise.abs().mean()}


def toy_recipe(**changes) -> Recipe:
    """A recipe of 20 steps with a checkpoint every 5."""
    values = {
        "name": "toy",
        "stage": "toy",
        "seed": 3,
        "steps": 20,
        "batch_size": 8,
        "lr": 1e-2,
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "checkpoint_every": 5,
        "log_every": 4,
        "lr_scale": {"head": 0.5},
    }
    return Recipe.from_mapping({**values, **changes})


def kill_myself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    out, moment = Path(sys.argv[1]), sys.argv[2]

    def die_at_13(step: int) -> None:
        if step == 13:
            kill_myself()

    if moment == "in a checkpoint":
        save_file, written = checkpoint.save_file, []

        def die_in_the_third(tensors, path) -> None:
            save_file(tensors, path)
            written.append(path)
            if len(written) == 10:  # four files in each: the second file of the third checkpoint
                kill_myself()

        checkpoint.save_file = die_in_the_third
    stage = ToyStage(die_at_13 if moment == "in a step" else lambda step: None)
    fit(ToyModel(), stage, toy_recipe(), out, progress=False)
