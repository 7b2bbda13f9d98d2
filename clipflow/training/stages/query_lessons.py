"""What the queries of a BLIP3-o shall say, learned along with understanding.

While a BLIP3-o learns to draw, its language model is frozen. A large one has long learned to say
anything about a prompt; a small one must be told what its queries will be asked for:

    after a prompt         query i says word i of the prompt's meaning
    after an edit          query i says color and shape of what will stand in cell i of the grid
"""

# Shape suffixes: B = prompts, Q = queries.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.scenes import Scene, make_prompt, plain_form, sample_edit
from clipflow.scenes.prompts import TAGS
from clipflow.scenes.world import GRID
from clipflow.training.stages.naming import COLORS, FORMS, word_labels
from clipflow.training.stages.scene_data import IGNORED, SceneText, left_padded, pixel_values

PROMPT_TAGS = (*TAGS, "reasoning", "reasoning", "position", "position")
CELLS = GRID * GRID


class QueryLessons:
    """Rows and losses for one model and its tokenizer."""

    def __init__(self, model: nn.Module, text: SceneText) -> None:
        self.config, self.text = model.config, text
        self.colors = torch.tensor([text.ids(word)[0] for word in COLORS])
        self.forms = torch.tensor([text.ids(word)[0] for word in FORMS])

    def batch(self, rng: np.random.Generator, prompts: int, edits: int) -> dict[str, Tensor]:
        """`prompts` rows of words and `edits` rows of cells."""
        write, ids = self.text.prompts, self.text.ids
        drawn = [make_prompt(rng, PROMPT_TAGS[rng.integers(len(PROMPT_TAGS))], seen=True)
                 for _ in range(prompts)]  # fmt: skip
        rows = [ids(write.text_to_image(prompt.text)) for prompt in drawn]
        batch = dict(zip(("ids", "mask"), left_padded(rows, self.text.pad), strict=True))
        meanings = [plain_form(prompt) for prompt in drawn]
        batch["words"] = word_labels(meanings, self.text, self.config.n_query)
        if edits:
            before, asked, after = zip(*(sample_edit(rng) for _ in range(edits)), strict=True)
            rows = [ids(write.edit(text)) for text in asked]
            batch["edit_ids"], batch["edit_mask"] = left_padded(rows, self.text.pad)
            batch["pixel_values"] = pixel_values(before, rng, self.config)
            batch["cells"] = torch.stack([cell_labels(scene) for scene in after])
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
        """Mean cross-entropy of the words, plus those of the colors and shapes of cells."""
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        hidden = model.encode_condition(batch["ids"], batch["mask"]).hidden
        said = batch["words"] != IGNORED
        loss = F.cross_entropy(model.head(hidden[said]), batch["words"][said])
        if "cells" not in batch:
            return loss
        features = model.encode_image(batch["pixel_values"])
        hidden = model.encode_condition(batch["edit_ids"], batch["edit_mask"], features).hidden
        logits, cells = model.head(hidden[:, :CELLS]).flatten(0, 1), batch["cells"].flatten(0, 1)
        color = F.cross_entropy(logits[:, self.colors.to(device)], cells[:, 0])
        form = F.cross_entropy(logits[:, self.forms.to(device)], cells[:, 1])
        return loss + color + form


def cell_labels(scene: Scene) -> Tensor:
    """Indices into `COLORS` and `FORMS` of what stands in each cell: [9, 2] int64."""
    labels = torch.tensor([[COLORS.index(scene.background), FORMS.index("background")]] * CELLS)
    for thing in scene.objects:
        place = torch.tensor([COLORS.index(thing.color), FORMS.index(thing.shape)])
        labels[thing.cell] = place
    return labels
