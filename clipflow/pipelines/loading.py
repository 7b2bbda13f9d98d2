"""Read the parts of a model folder, whatever its family."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from clipflow.errors import InputError
from clipflow.models.folders.checkpoint import read_config
from clipflow.models.folders.loading import name_weights, open_model
from clipflow.models.folders.parts import count_shapes, part_of
from clipflow.pipelines.families import family_of_folder
from clipflow.pipelines.families.base import Family
from clipflow.pipelines.tokenizer_files import read_tokenizer


@dataclass(frozen=True, kw_only=True)
class FolderSummary:
    """What the headers of a model folder say.

    Attributes:
        family: of the model.
        config: of the model.
        counts: parameters of each of the family's parts.
        dtypes: part -> dtypes that it is stored in, each with its number of parameters.
        skipped: what the files hold besides the model -> number of tensors.
    """

    family: Family
    config: Any
    counts: Mapping[str, int]
    dtypes: Mapping[str, Mapping[torch.dtype, int]]
    skipped: Mapping[str, int]

    @property
    def dtype(self) -> torch.dtype:
        """That `dtype="auto"` means: as stored, and where parts differ the one that holds all.

        Parts that are float32 always are left out, and so is the decoder.
        """
        others = (*self.family.wide, "decoder")
        stored = [d for part, found in self.dtypes.items() if part not in others for d in found]
        return reduce(torch.promote_types, stored) if stored else torch.float32


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The model in a folder, its weights straight in `dtype` on `device`.

    Args:
        folder: of the model.
        dtype: of all but what is float32 always; of each weight as stored when not given.
        device: where the weights go.

    Raises:
        InputError: config.json or the weights are broken, or do not belong together.
    """
    family = family_of_folder(folder)
    with _one_line(folder):
        return family.model_class.from_pretrained(folder, dtype=dtype, device=device)


def check_model(folder: Path) -> None:
    """Refuse a folder that `load_model` would refuse, but for the values of its weights.

    Raises:
        InputError: config.json or the weights are broken, or do not belong together.
    """
    family = family_of_folder(folder)
    with _one_line(folder):
        open_model(family.model_class, folder, family.folder_format)
        family.decoder_tensors(folder)


def summarize_folder(folder: Path) -> FolderSummary:
    """What is in a model folder, from config.json and the headers of the weights alone.

    Raises:
        InputError: config.json or the weights are broken.
    """
    family = family_of_folder(folder)
    with _one_line(folder):
        values, weights = read_config(folder), family.folder_format.open_weights(folder)
        names, shapes = name_weights(weights, family.folder_format)
        tensors = {own: (shapes[own], weights.dtypes[found]) for own, found in names.items()}
        tensors |= family.decoder_tensors(folder)
        dtypes: dict[str, dict[torch.dtype, int]] = {}
        for own, (shape, dtype) in tensors.items():
            part = part_of(own, family.parts)
            if part is None:
                continue  # `load_model` names all that is unknown
            held = dtypes.setdefault(part, {})
            held[dtype] = held.get(dtype, 0) + math.prod(shape)
        counted = {own: shape for own, (shape, _) in tensors.items()}
        return FolderSummary(
            family=family,
            config=family.folder_format.read_config(values, shapes),
            counts=count_shapes(counted, family.parts),
            dtypes=dtypes,
            skipped=family.skipped_names(weights.shapes),
        )


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Whatever is wrong with the files becomes an InputError."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{folder}: the model cannot be read: {text}") from error


def load_tokenizer(folder: Path, family: Family, config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, from tokenizer.json or from vocab.json and merges.txt.

    Args:
        folder: of the model.
        family: of the model.
        config: of the model, which the tokenizer must agree with.

    Raises:
        InputError: a file is missing or broken, or the special tokens are not the model's.
    """
    tokenizer = read_tokenizer(folder)
    family.check_tokenizer(tokenizer, config, folder)
    return tokenizer
