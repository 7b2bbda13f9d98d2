"""The families of models that a pipeline runs; each is one file here and one folder of models."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from clipflow.errors import InputError
from clipflow.models.folders.checkpoint import read_config

if TYPE_CHECKING:
    from clipflow.pipelines.families.base import Family

# model_type of a config.json -> the module whose FAMILY reads it.
MODEL_TYPES = {
    "clipflow_unilip": "unilip",
    "clipflow_unilip_tokenizer": "unilip",
    "unilip_internvl": "unilip",
    "clipflow_blip3o": "blip3o",
    "blip3o_qwen": "blip3o",
    "blip3o_qwen_inference": "blip3o",
    "clipflow_blip3o_next": "blip3o_next",
}
# A field that only published BLIP3o-NEXT have; their model_type is that of others, too.
NEXT_FIELD = "image_start_token_id"


def family_of_folder(folder: Path) -> Family:
    """The family of the model in `folder`, by its config.json.

    Raises:
        InputError: config.json cannot be read or is of no family.
    """
    try:
        values = read_config(folder)
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{folder}: the model cannot be read: {text}") from error
    if NEXT_FIELD in values:
        return _family("blip3o_next")
    found = values.get("model_type")
    if not isinstance(found, str) or found not in MODEL_TYPES:
        raise InputError(
            f"{folder}: the model cannot be read: model_type in config.json must be one of "
            f"{', '.join(MODEL_TYPES)}, got {str(found)[:80]!r}"
        )
    return _family(MODEL_TYPES[found])


def family_of_model(model: nn.Module) -> Family:
    """The family of a model that is in memory.

    Raises:
        TypeError: it is of none.
    """
    for cls in type(model).__mro__:
        # By name, so that no other family has to be imported.
        package, _, _ = cls.__module__.removeprefix("clipflow.models.").partition(".")
        if package in MODEL_TYPES.values() and isinstance(model, _family(package).model_class):
            return _family(package)
    raise TypeError(f"pipeline: model must be of a known family, got {type(model).__name__}")


def _family(module: str) -> Family:
    # Imported when used: each brings the libraries of its own models.
    return importlib.import_module(f"clipflow.pipelines.families.{module}").FAMILY
