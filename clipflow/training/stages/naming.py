"""Dense naming: every image feature, read by the LM's own head, names what stands at its place.

    features [B, N, H] -> rms norm -> lm_head -> cross-entropy among the colors, and the shapes,
                                                 and by degrees of left to right, top to bottom

Answers alone teach a vision tower slowly, some six words a picture; this gives it 4 N. The head is
the model's own, so nothing is added to it, and the features come to lie where the LM has its words.
"""

# Shape suffixes: B = pictures, N = image features of one.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.scenes import Scene
from clipflow.scenes.world import BACKGROUND_NAMES, CANVAS, COLOR_NAMES, SHAPES
from clipflow.training.stages.scene_data import IGNORED, SceneText
from clipflow.training.stages.scene_prompts import feature_side

COLORS = (*COLOR_NAMES, *BACKGROUND_NAMES)
FORMS = (*SHAPES, "background")
SIDES = (("left", "right"), ("top", "bottom"))
REACH = 8  # px around an object's center, on both axes, that count as its place


class Naming:
    """The loss, and the labels that it needs, for one model and its tokenizer."""

    def __init__(self, model: nn.Module, text: SceneText) -> None:
        self.side = feature_side(model.config)
        self.colors = torch.tensor([text.ids(word)[0] for word in COLORS])
        self.forms = torch.tensor([text.ids(word)[0] for word in FORMS])
        self.sides = torch.tensor([[text.ids(word)[0] for word in pair] for pair in SIDES])

    def labels(self, scenes: Sequence[Scene]) -> Tensor:
        """Indices into `COLORS` and `FORMS`: [B, N, 2] int64."""
        places = (np.arange(self.side) + 0.5) * CANVAS / self.side
        labels = np.empty((len(scenes), self.side, self.side, 2), dtype=np.int64)
        for label, scene in zip(labels, scenes, strict=True):
            label[:] = COLORS.index(scene.background), FORMS.index("background")
            for thing in scene.objects:
                x, y = (abs(places - center) <= REACH for center in thing.center)
                label[np.ix_(y, x)] = COLORS.index(thing.color), FORMS.index(thing.shape)
        return torch.from_numpy(labels.reshape(len(scenes), -1, 2))

    def loss(self, model: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of color, shape and place of `features` [B, N, H]; `labels` [B, N, 2]."""
        logits = model.head(F.rms_norm(features, features.shape[-1:])).flatten(0, 1)
        device = logits.device
        labels = labels.flatten(0, 1)
        color = F.cross_entropy(logits[:, self.colors.to(device)], labels[:, 0])
        form = F.cross_entropy(logits[:, self.forms.to(device)], labels[:, 1])
        said = logits[:, self.sides.to(device)].log_softmax(-1)
        wanted = self.places().to(device).repeat(len(features), 1, 1)
        place = F.kl_div(said, wanted, reduction="none").sum(-1).mean()
        return color + form + place

    def places(self) -> Tensor:
        """How much of "left" and "right", "top" and "bottom" each feature is: [N, 2, 2], sums 1."""
        ends = (torch.arange(self.side) + 0.5) / self.side
        y, x = torch.meshgrid(ends, ends, indexing="ij")
        second = torch.stack([x, y], dim=-1).flatten(0, 1)
        return torch.stack([1 - second, second], dim=-1)


class QueryNaming:
    """The same for drawing: what the connector makes of the queries, read by the LM's head, says
    the prompt's meaning, one word a query.

    Which of two things is left or right moves the velocities little and late, so a connector
    trained by them alone drops the word; and a DiT that is not told cannot ask for it.
    """

    def __init__(self, model: nn.Module, text: SceneText) -> None:
        self.text, self.count = text, model.config.n_query
        self.hidden: Tensor | None = None
        if hasattr(model, "llm_connector"):
            model.llm_connector.register_forward_hook(self._keep)
        else:  # the language model itself says what the DiT reads
            model.language_model.register_forward_hook(self._keep)

    def labels(self, meanings: Sequence[str | None]) -> Tensor:
        """Ids of the words [B, n_query] int64; `IGNORED` after them and where there is None."""
        return word_labels(meanings, self.text, self.count)

    def loss(self, model: nn.Module, labels: Tensor) -> Tensor:
        """Mean cross-entropy of `labels` [B, n_query] in the connector's last forward pass."""
        if self.hidden is None:
            raise RuntimeError("query naming: the connector must run before its loss is asked")
        hidden, self.hidden = self.hidden[:, -self.count :], None
        said = labels != IGNORED
        if not said.any():
            return hidden.sum() * 0
        return F.cross_entropy(model.head(hidden[said]), labels[said])

    def _keep(self, reader: nn.Module, args: tuple, given: object) -> None:
        self.hidden = getattr(given, "last_hidden_state", given)


def word_labels(meanings: Sequence[str | None], text: SceneText, count: int) -> Tensor:
    """Ids of the first `count` words, [B, count] int64; `IGNORED` after them and for None."""
    labels = torch.full((len(meanings), count), IGNORED)
    for label, meaning in zip(labels, meanings, strict=True):
        words = [] if meaning is None else text.ids(meaning)[:count]
        label[: len(words)] = torch.tensor(words, dtype=torch.long)
    return labels
