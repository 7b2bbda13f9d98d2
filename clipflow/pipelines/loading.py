"""Read the parts of a model folder."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from clipflow.errors import InputError
from clipflow.models.unilip import UniLIPConfig, UniLIPModel
from clipflow.models.unilip.checkpoint import open_weights, read_config
from clipflow.models.unilip.keys import map_names
from clipflow.models.unilip.loading import read_unilip_config
from clipflow.models.unilip.sizes import count_shapes


def load_unilip(folder: Path) -> UniLIPModel:
    """The model in a folder, on the CPU, in the dtypes of its files.

    Raises:
        InputError: config.json or the weights are broken, or do not belong together.
    """
    try:
        return UniLIPModel.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise InputError(f"{folder}: the model cannot be read: {error}") from error


def read_unilip_folder(folder: Path) -> UniLIPConfig:
    """The configuration of the model in a folder; of the weights only the headers are read.

    Raises:
        InputError: config.json or the weights are broken.
    """
    return read_unilip_sizes(folder)[0]


def read_unilip_sizes(folder: Path) -> tuple[UniLIPConfig, dict[str, int]]:
    """The configuration and the parameters of each part, from the headers of the weights.

    Raises:
        InputError: config.json or the weights are broken.
    """
    try:
        values = read_config(folder)
        with open_weights(folder) as weights:
            names = map_names(weights.shapes)
            shapes = {own: weights.shapes[found] for own, found in names.items()}
            return read_unilip_config(values, shapes), count_shapes(shapes)
    except (ValueError, OSError) as error:
        raise InputError(f"{folder}: the model cannot be read: {error}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, from its tokenizer.json.

    Raises:
        InputError: the file is missing or broken.
    """
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: a model folder must hold tokenizer.json")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception on broken files
        raise InputError(f"{folder / 'tokenizer.json'}: cannot be read: {error}") from error
