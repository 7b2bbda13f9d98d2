"""Pictures, prompts and packed conversations of the scenes world, as tensors."""

# Shape suffixes: B = batch, T = tokens of a row.

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from clipflow.models.unilip.config import UniLIPConfig
from clipflow.pipelines.unilip_prompts import UniLIPPrompts
from clipflow.scenes import Scene, render_batch
from clipflow.scenes.tokenizer import make_tokenizer

IGNORED = -100


def pixel_values(scenes: Sequence[Scene], rng: np.random.Generator, config: UniLIPConfig) -> Tensor:
    """Rendered scenes, normalized for the vision tower: [B, 3, S, S] float32."""
    return normalize(torch.from_numpy(render_batch(scenes, rng)), config)


def normalize(pictures: Tensor, config: UniLIPConfig) -> Tensor:
    """[B, S, S, 3] uint8 to what the vision tower reads."""
    mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
    values = (pictures.float() / 255 - mean) / std
    return values.permute(0, 3, 1, 2).contiguous()


class SceneText:
    """Token rows of prompts and conversations. Calls are cached: the world has few sentences."""

    def __init__(self, config: UniLIPConfig) -> None:
        self.prompts = UniLIPPrompts(make_tokenizer(), config)
        self.pad = config.tokens.pad
        question = self.prompts.question("?")
        self._head = question[: question.index("</img>") + len("</img>")]
        self.prefix = self.prompts.ids(self._head)
        self.ids = lru_cache(maxsize=200_000)(self.prompts.ids)

    def conversation(self, asked: Sequence[tuple[str, str]]) -> tuple[list[int], list[int], list]:
        """One row: the picture, then every (question, answer) as if it alone followed.

        Returns:
            ids, labels (`IGNORED` where nothing is learned) and, for each token, the number of its
            segment: 0 for the picture, 1.. for the exchanges.
        """
        ids, labels, segments = list(self.prefix), [IGNORED] * len(self.prefix), None
        segments = [0] * len(ids)
        for number, (question, answer) in enumerate(asked, start=1):
            turn = self.prompts.question(question)[len(self._head) :]
            read, said = self.ids(turn), self.ids(answer + "<|im_end|>")
            ids += [*read, *said]
            labels += [IGNORED] * len(read) + [*said]
            segments += [number] * (len(read) + len(said))
        return ids, labels, segments

    def plain(self, prompt: str, meaning: str) -> tuple[list[int], list[int], list[int]]:
        """One row without a picture: a prompt, answered by its meaning in the plainest words."""
        read = self.ids(self.prompts.text_to_image(prompt).removesuffix("<img>"))
        said = self.ids(meaning + "<|im_end|>")
        labels = [IGNORED] * len(read) + [*said]
        return [*read, *said], labels, [1] * len(labels)


def pack(rows: Sequence[tuple[list[int], list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Pad rows on the right and build what keeps their segments apart.

    Returns:
        input_ids, labels, position_ids [B, T] int64 (each segment counts on from the picture) and
        attention_mask [B, 1, T, T] bool: causal, within a segment or to the picture.
    """
    B, T = len(rows), max(len(ids) for ids, _, _ in rows)
    ids = np.full((B, T), pad)
    labels = np.full((B, T), IGNORED)
    segments = np.full((B, T), -1)
    positions = np.zeros((B, T), dtype=np.int64)
    for row, (row_ids, row_labels, row_segments) in enumerate(rows):
        n = len(row_ids)
        ids[row, :n], labels[row, :n], segments[row, :n] = row_ids, row_labels, row_segments
        positions[row, :n] = _positions(segments[row, :n])
    same = segments[:, :, None] == segments[:, None, :]
    picture = (segments == 0)[:, None, :]
    causal = np.tril(np.ones((T, T), dtype=bool))
    mask = torch.from_numpy((same | picture) & causal)
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": mask[:, None],
    }


def _positions(segments: np.ndarray) -> np.ndarray:
    picture = int((segments == 0).sum())
    starts = np.flatnonzero(np.diff(segments, prepend=segments[0] - 1))
    lengths = np.diff(np.append(starts, len(segments)))
    counted = np.arange(len(segments)) - np.repeat(starts, lengths)
    return counted + np.where(segments == 0, 0, picture)
