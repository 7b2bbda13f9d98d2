"""Pictures, prompts and packed conversations of the scenes world, as tensors."""

# Shape suffixes: B = batch, T = tokens of a row.

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.scenes import Scene, render_batch
from clipflow.training.stages.scene_prompts import SceneConfig, feature_side, scene_prompts

IGNORED = -100


def pixel_values(scenes: Sequence[Scene], rng: np.random.Generator, config: SceneConfig) -> Tensor:
    """Rendered scenes, normalized for the vision tower: [B, 3, S, S] float32."""
    return normalize(torch.from_numpy(render_batch(scenes, rng)), config)


def normalize(pictures: Tensor, config: SceneConfig) -> Tensor:
    """[B, S, S, 3] uint8 to what the vision tower reads."""
    mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
    values = (pictures.float() / 255 - mean) / std
    return values.permute(0, 3, 1, 2).contiguous()


class SceneText:
    """Token rows of prompts and conversations. Calls are cached: the world has few sentences."""

    def __init__(self, config: SceneConfig) -> None:
        self.prompts = scene_prompts(config)
        self.pad = config.tokens.pad
        multimodal = isinstance(config, BLIP3oConfig)
        # Where pictures have rows and columns: the id at their places, and features per side.
        self.grid = (config.tokens.image_pad, feature_side(config)) if multimodal else None
        question, picture = self.prompts.question("?"), self.prompts.picture()
        self._head = question[: question.index(picture) + len(picture)]
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
        read = self.ids(self.prompts.text_to_image(prompt))[:-1]  # the marker of a drawn picture
        said = self.ids(meaning + "<|im_end|>")
        labels = [IGNORED] * len(read) + [*said]
        return [*read, *said], labels, [1] * len(labels)


def pack(
    rows: Sequence[tuple[list[int], list[int], list[int]]], text: SceneText
) -> dict[str, Tensor]:
    """Pad rows on the right and build what keeps their segments apart.

    Returns:
        input_ids, labels [B, T] int64, position_ids [B, T] (each segment counts on from the
        picture), or [3, B, T] where pictures have rows and columns, and attention_mask
        [B, 1, T, T] bool: causal, within a segment or to the picture.
    """
    B, T = len(rows), max(len(ids) for ids, _, _ in rows)
    ids = np.full((B, T), text.pad)
    labels = np.full((B, T), IGNORED)
    segments = np.full((B, T), -1)
    positions = np.zeros((3, B, T), dtype=np.int64)
    for row, (row_ids, row_labels, row_segments) in enumerate(rows):
        n = len(row_ids)
        ids[row, :n], labels[row, :n], segments[row, :n] = row_ids, row_labels, row_segments
        positions[:, row, :n] = _positions(ids[row, :n], segments[row, :n], text.grid)
    same = segments[:, :, None] == segments[:, None, :]
    picture = (segments == 0)[:, None, :]
    causal = np.tril(np.ones((T, T), dtype=bool))
    mask = torch.from_numpy((same | picture) & causal)
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions if text.grid else positions[0]),
        "attention_mask": mask[:, None],
    }


def left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B, T] of token rows, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _positions(ids: np.ndarray, segments: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray:
    """[3, n]: of time, row and column; each segment counts on from the picture's."""
    picture = int((segments == 0).sum())
    first = _picture_positions(ids[:picture], grid)
    starts = np.flatnonzero(np.diff(segments, prepend=segments[0] - 1))
    lengths = np.diff(np.append(starts, len(segments)))
    counted = np.arange(len(segments)) - np.repeat(starts, lengths)
    following = counted[picture:] + (int(first.max()) + 1 if picture else 0)
    return np.concatenate([first, np.broadcast_to(following, (3, len(following)))], axis=1)


def _picture_positions(ids: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray:
    """[3, n] of text around one picture: plain, or with rows and columns as Qwen2.5-VL's."""
    plain = np.broadcast_to(np.arange(len(ids)), (3, len(ids)))
    if grid is None or not len(ids):
        return plain
    pad, side = grid
    begin = int(np.flatnonzero(ids == pad)[0])
    after = np.arange(len(ids) - begin - side**2) + begin + side
    rows, columns = np.divmod(np.arange(side**2), side)
    places = begin + np.stack([np.zeros_like(rows), rows, columns])
    after = np.broadcast_to(after, (3, len(after)))
    return np.concatenate([plain[:, :begin], places, after], axis=1)
