"""Read the parts of a model folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from clipflow.errors import InputError
from clipflow.models.folders.checkpoint import open_weights, read_config
from clipflow.models.folders.loading import name_weights, open_model
from clipflow.models.unilip import UniLIPConfig, UniLIPModel
from clipflow.models.unilip.keys import skipped_names
from clipflow.models.unilip.loading import FORMAT, read_unilip_config
from clipflow.models.unilip.sizes import count_shapes, part_of
from clipflow.pipelines.tokenizer_files import check_tokenizer, read_tokenizer

# Parts that are float32 in every dtype.
WIDE = ("clip_down", "decoder")


@dataclass(frozen=True, kw_only=True)
class FolderSummary:
    """What the headers of a model folder say.

    Attributes:
        config: of the model.
        counts: parameters of each part of `clipflow.models.unilip.sizes`.
        dtypes: part -> dtypes that it is stored in, each with its number of parameters.
        skipped: what the files hold besides the model -> number of tensors.
    """

    config: UniLIPConfig
    counts: Mapping[str, int]
    dtypes: Mapping[str, Mapping[torch.dtype, int]]
    skipped: Mapping[str, int]

    @property
    def dtype(self) -> torch.dtype:
        """That `dtype="auto"` means: as stored, and where parts differ the one that holds all.

        The decoder is left out, as it is float32 always.
        """
        stored = [d for part, found in self.dtypes.items() if part not in WIDE for d in found]
        return reduce(torch.promote_types, stored) if stored else torch.float32


def load_unilip(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> UniLIPModel:
    """The model in a folder, its weights straight in `dtype` on `device`; the decoder is float32.

    Args:
        folder: of the model.
        dtype: of all but the decoder; of each weight as stored when not given.
        device: where the weights go.

    Raises:
        InputError: config.json or the weights are broken, or do not belong together.
    """
    with _one_line(folder):
        return UniLIPModel.from_pretrained(folder, dtype=dtype, device=device)


def check_unilip(folder: Path) -> None:
    """Refuse a folder that `load_unilip` would refuse, but for the values of its weights.

    Raises:
        InputError: config.json or the weights are broken, or do not belong together.
    """
    with _one_line(folder):
        open_model(UniLIPModel, folder, FORMAT)


def read_unilip_folder(folder: Path) -> UniLIPConfig:
    """The configuration of the model in a folder; of the weights only the headers are read.

    Raises:
        InputError: config.json or the weights are broken.
    """
    return summarize_folder(folder).config


def read_unilip_sizes(folder: Path) -> tuple[UniLIPConfig, Mapping[str, int]]:
    """The configuration and the parameters of each part, from the headers of the weights.

    Raises:
        InputError: config.json or the weights are broken.
    """
    summary = summarize_folder(folder)
    return summary.config, summary.counts


def summarize_folder(folder: Path) -> FolderSummary:
    """What is in a model folder, from config.json and the headers of the weights alone.

    Raises:
        InputError: config.json or the weights are broken.
    """
    with _one_line(folder):
        values, weights = read_config(folder), open_weights(folder)
        names, shapes = name_weights(weights, FORMAT)
        dtypes: dict[str, dict[torch.dtype, int]] = {}
        for own, found in names.items():
            part, dtype = part_of(own), weights.dtypes[found]
            if part is None:
                continue  # `load_unilip` names all that is unknown
            held = dtypes.setdefault(part, {})
            held[dtype] = held.get(dtype, 0) + math.prod(shapes[own])
        return FolderSummary(
            config=read_unilip_config(values, shapes),
            counts=count_shapes(shapes),
            dtypes=dtypes,
            skipped=skipped_names(weights.shapes),
        )


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Whatever is wrong with the files becomes an InputError."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{folder}: the model cannot be read: {text}") from error


def load_tokenizer(folder: Path, config: UniLIPConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, from tokenizer.json or from vocab.json and merges.txt.

    Args:
        folder: of the model.
        config: of the model, which the tokenizer must agree with; not checked when not given.

    Raises:
        InputError: a file is missing or broken, or the special tokens are not the model's.
    """
    tokenizer = read_tokenizer(folder)
    if config is not None:
        check_tokenizer(tokenizer, config, folder)
    return tokenizer
