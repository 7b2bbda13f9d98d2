"""The eyes of a scenes BLIP3-o: they learn to give its language model what the teacher's gives.

The vision tower has no positions, so it regresses what of the teacher's features depends on the
content alone. Then the first layers of the language model, which the teacher does not have, learn
to add where each feature is, in the positions of understanding and in the plain ones of drawing,
and to leave words as they are.
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
from clipflow.scenes import QUESTION_KINDS, TAGS, make_prompt, random_scene, sample_question
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
        self.text = SceneText(model.config)
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

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Pictures or their features, the teacher's features; and what is said about pictures."""
        rng = np.random.default_rng([self.recipe.seed, 8, step])
        chosen = rng.integers(len(self.pool.features), size=self.recipe.batch_size)
        wanted = self.pool.features[chosen].float()
        if self.seen is None:
            return normalize(self.pool.pictures[chosen], self.model.config), wanted
        asked = None
        while asked is None:
            kind = QUESTION_KINDS[rng.integers(len(QUESTION_KINDS))]
            asked = sample_question(rng, random_scene(rng), kind)
        prompt = make_prompt(rng, TAGS[rng.integers(len(TAGS))], seen=True).text
        packed = pack([self.text.conversation([asked])], self.text)
        alone = torch.tensor([self.text.ids(self.text.prompts.text_to_image(prompt))])
        given = self.seen[chosen].float()
        return given, wanted, packed["input_ids"], packed["position_ids"], alone

    def loss(self, batch: tuple[Tensor, ...], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        given, wanted, *rows = (part.to(self.device) for part in batch)
        if self.seen is None:
            return F.mse_loss(self.model.encode_image(given), wanted), {}
        ids, positions, alone = rows
        pictures = ids[0] == self.model.config.tokens.image_pad
        embedded = self.model.embed_prompt(ids.expand(len(given), -1), given)
        count = len(given)
        plain = plain_positions(torch.ones_like(ids))
        losses = {}
        for name, places in (("multimodal", positions), ("plain", plain)):
            read = self._read(embedded, places.expand(-1, count, -1))
            losses[name] = F.mse_loss(read[:, pictures], wanted)
            losses[f"{name}_words"] = F.mse_loss(read[:, ~pictures], embedded[:, ~pictures])
        words = self.model.embed_prompt(alone)
        read = self._read(words, plain_positions(torch.ones_like(alone)))
        losses["words"] = F.mse_loss(read, words)
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

    def _read(self, embedded: Tensor, positions: Tensor) -> Tensor:
        return self.first(
            inputs_embeds=embedded,
            attention_mask={"full_attention": None},
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state


def first_layers(model: BLIP3oModel, count: int) -> nn.Module:
    """A language model of the first layers of `model`'s, with the same parameters, no last norm."""
    first = make_language_model(dataclasses.replace(model.config.text, num_hidden_layers=count))
    first.embed_tokens, first.norm = model.language_model.embed_tokens, nn.Identity()
    first.layers = model.language_model.layers[:count]
    return first.to(model.device)


STAGE = Seeing
