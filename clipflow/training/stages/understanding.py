"""Understanding: vision tower, projector and LM learn to answer questions about pictures.

Next-token loss on answers only. All questions about one picture share its tokens: they lie in one
row, apart from each other by the attention mask. Rows without a picture teach the LM what prompts
mean ("two plus one red stars" is "three red stars"), so that the frozen LM can condition drawing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.scenes import (
    QUESTION_KINDS,
    make_prompt,
    plain_form,
    random_scene,
    sample_asked_scene,
    sample_question,
    sample_relation,
)
from clipflow.scenes.prompts import TAGS
from clipflow.training.recipe import Recipe
from clipflow.training.stages.naming import Naming
from clipflow.training.stages.query_lessons import QueryLessons
from clipflow.training.stages.scene_data import IGNORED, SceneText, pack, pixel_values

PLAIN_TAGS = (*TAGS, "reasoning", "reasoning", "position")


class Understanding:
    """Options.

    `questions`: per picture; `kinds`: how often each kind is asked, 1 where not named.
    `relations`: lessons of `sample_relation` per picture. `plain_rows`: rows without a picture, per
    batch. `naming`: weight of the dense naming loss. `queries`: [prompts, edits] after which the
    queries are taught what to say, per batch; `queries_weight` of that loss.
    """

    def setup(self, model: nn.Module, recipe: Recipe, workdir: Path, device: torch.device) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.text = SceneText(model.config)
        self.images_per_batch = recipe.batch_size
        self.questions = recipe.options.get("questions", 8)
        self.relations = recipe.options.get("relations", 0)
        self.plain_rows = recipe.options.get("plain_rows", 16)
        often = [recipe.options.get("kinds", {}).get(kind, 1.0) for kind in QUESTION_KINDS]
        self.kinds = np.cumsum(often) / sum(often)
        self.naming_weight = recipe.options.get("naming", 0.5)
        self.naming = Naming(model, self.text)
        self.query_rows = recipe.options.get("queries")
        self.query_weight = recipe.options.get("queries_weight", 1.0)
        self.query_lessons = QueryLessons(model, self.text)

    def batch(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.recipe.seed, 1, step])
        scenes, rows = [], []
        for index in range(self.recipe.batch_size):
            kind = self._kind(index / self.recipe.batch_size)
            scene, *asked = (
                (random_scene(rng, count=1),) if index % 8 == 7 else sample_asked_scene(rng, kind)
            )
            pairs = [tuple(asked)] if asked else []
            while len(pairs) < self.questions:
                pair = sample_question(rng, scene, self._kind(rng.random()))
                if pair is not None:
                    pairs.append(pair)
            lessons = (sample_relation(rng, scene) for _ in range(self.relations))
            pairs += [lesson for lesson in lessons if lesson is not None]
            scenes.append(scene)
            rows.append(self.text.conversation(pairs))
        plain = []
        for _ in range(self.plain_rows):
            prompt = make_prompt(rng, PLAIN_TAGS[rng.integers(len(PLAIN_TAGS))], seen=True)
            plain.append(self.text.plain(prompt.text, plain_form(prompt)))
        return {
            "pixel_values": pixel_values(scenes, rng, self.model.config),
            "names": self.naming.labels(scenes),
            "seen": pack(rows, self.text),
            "plain": pack(plain, self.text) if plain else None,
            "queries": self.query_lessons.batch(rng, *self.query_rows) if self.query_rows else None,
        }

    def _kind(self, share: float) -> str:
        """The kind of question at `share`, in [0, 1), of them all."""
        return QUESTION_KINDS[int(np.searchsorted(self.kinds, share, side="right"))]

    def loss(self, batch: dict, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.model.encode_image(batch["pixel_values"].to(self.device))
        seen = answer_loss(self.model, batch["seen"], features, self.device)
        loss, metrics = seen, {"seen": seen.detach()}
        if self.naming_weight:
            names = self.naming.loss(self.model, features, batch["names"].to(self.device))
            loss = loss + self.naming_weight * names
            metrics["names"] = names.detach()
        if batch["plain"] is not None:
            plain = answer_loss(self.model, batch["plain"], None, self.device)
            loss = loss + 0.25 * plain
            metrics["plain"] = plain.detach()
        if batch["queries"] is not None:
            queries = self.query_lessons.loss(self.model, batch["queries"], self.device)
            loss = loss + self.query_weight * queries
            metrics["queries"] = queries.detach()
        return loss, metrics


def answer_loss(
    model: nn.Module, packed: dict[str, Tensor], features: Tensor | None, device: torch.device
) -> Tensor:
    """Mean cross-entropy of the labeled tokens of packed rows."""
    packed = {name: tensor.to(device) for name, tensor in packed.items()}
    hidden = model.language_model(
        inputs_embeds=model.embed_prompt(packed["input_ids"], features),
        attention_mask=packed["attention_mask"],
        position_ids=packed["position_ids"],
        use_cache=False,
    ).last_hidden_state
    targets = packed["labels"][:, 1:]
    said = targets != IGNORED
    return F.cross_entropy(model.head(hidden[:, :-1][said]), targets[said])


STAGE = Understanding
