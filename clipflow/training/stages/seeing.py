"""The eyes of a scenes BLIP3-o: they learn to give its language model what the teacher's gives.

The vision tower has no positions, so it regresses what of the teacher's features depends on the
content alone. Then the first layers of the language model, which the teacher does not have, learn
to add where each feature is, in the positions of understanding and in the plain ones of drawing.
"""

# Shape suffixes: B = pictures, N = features of one, H = width of the language model.

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.models.blip3o.model import BLIP3oModel
from clipflow.models.blip3o.qwen import make_language_model, plain_positions
from clipflow.training.recipe import Recipe
from clipflow.training.stages.scene_data import SceneText, normalize, pack
from clipflow.training.teacher import ENCODE_BATCH, load_teacher, picture_lessons


class Seeing:
    """The vision tower where the recipe trains it, else the layers after it.

    Options: `pictures`, the size of the pool; `new_layers`, those that the teacher has not.
    """

    def setup(
        self, model: BLIP3oModel, recipe: Recipe, workdir: Path, device: torch.device
    ) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.images_per_batch = recipe.batch_size
        rng = np.random.default_rng([recipe.seed, 6])
        count = recipe.options.get("pictures", 12_000)
        self.pool = picture_lessons(load_teacher(), count, rng, workdir)
        self.first = first_layers(model, recipe.options.get("new_layers", 1))
        text = SceneText(model.config)
        row = list(text.prefix)
        packed = pack([(row, row, [0] * len(row))], text)
        self.ids, multimodal = packed["input_ids"], packed["position_ids"]
        self.positions = torch.cat([multimodal, plain_positions(torch.ones_like(self.ids))], dim=1)
        trained = any(p.requires_grad for p in model.visual.parameters())
        self.seen = None if trained else self._seen()

    @torch.no_grad()
    def _seen(self) -> Tensor:
        """Features of the whole pool as the vision tower has learned them, float16."""
        seen = []
        for pictures in self.pool.pictures.split(ENCODE_BATCH):
            pixels = normalize(pictures, self.model.config).to(self.device)
            seen.append(self.model.encode_image(pixels).cpu().half())
        return torch.cat(seen)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.recipe.seed, 8, step])
        chosen = rng.integers(len(self.pool.features), size=self.recipe.batch_size)
        wanted = self.pool.features[chosen].float()
        if self.seen is not None:
            return self.seen[chosen].float(), wanted
        return normalize(self.pool.pictures[chosen], self.model.config), wanted

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        given, wanted = (part.to(self.device) for part in batch)
        if self.seen is None:
            loss = F.mse_loss(self.model.encode_image(given), wanted)
            return loss, {}
        read = self.first(
            inputs_embeds=self.model.embed_prompt(self.ids.expand(len(given), -1), given).repeat(
                2, 1, 1
            ),
            attention_mask={"full_attention": None},
            position_ids=self.positions.repeat_interleave(len(given), dim=1),
            use_cache=False,
        ).last_hidden_state
        places = self.ids[0] == self.model.config.tokens.image_pad
        understanding, plain = read[:, places].chunk(2)
        first, second = F.mse_loss(understanding, wanted), F.mse_loss(plain, wanted)
        return first + second, {"multimodal": first.detach(), "plain": second.detach()}


def first_layers(model: BLIP3oModel, count: int) -> nn.Module:
    """A language model of the first layers of `model`'s, with the same parameters, no last norm."""
    first = make_language_model(dataclasses.replace(model.config.text, num_hidden_layers=count))
    first.embed_tokens, first.norm = model.language_model.embed_tokens, nn.Identity()
    first.layers = model.language_model.layers[:count]
    return first.to(model.device)


STAGE = Seeing
