"""Folders of an `ImageTokenizer`: config.json beside safetensors, as those of whole models.

The three parts are found in the folder of a whole model, too; nothing else of it is read.
"""

from __future__ import annotations

from pathlib import Path

import torch

from clipflow.models.folders.checkpoint import open_weights, read_config, save_folder
from clipflow.models.folders.loading import empty_model, read_weights
from clipflow.models.unilip.image_codec import MODEL_TYPE, PARTS, ImageTokenizer, TokenizerConfig
from clipflow.models.unilip.keys import map_names
from clipflow.models.unilip.loading import WIDE, read_unilip_config, sizes


def is_tokenizer_folder(directory: Path) -> bool:
    """Whether config.json says so; False where it cannot be read."""
    try:
        return read_config(directory).get("model_type") == MODEL_TYPE
    except (OSError, ValueError):
        return False


def save_image_tokenizer(model: ImageTokenizer, directory: str | Path) -> None:
    """Write config.json and safetensors; see `checkpoint.save_folder` for what it promises."""
    save_folder(directory, model.config.to_dict(), model.state_dict())


def load_image_tokenizer(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> ImageTokenizer:
    """The tokenizer of pictures in `directory`, in evaluation mode.

    Args:
        directory: of a tokenizer, or of a whole model, ours or a published one.
        dtype: of vision tower and projector; as stored when not given. `vae_decoder` is float32.
        device: where the parameters go.

    Raises:
        FileNotFoundError: no such folder, or no config.json or weights in it.
        ValueError: a damaged file, other keys or shapes than the tokenizer's, or a weight that is
            NaN or infinite.
    """
    values, weights = read_config(directory), open_weights(directory)
    names = map_names(weights.shapes)
    shapes = {own: weights.shapes[found] for own, found in names.items()}
    if values.get("model_type") == MODEL_TYPE:
        config = TokenizerConfig.from_dict(values)
    else:
        config = TokenizerConfig.of_model(read_unilip_config(values, shapes))
        names = {own: found for own, found in names.items() if own.split(".")[0] in PARTS}
        shapes = {own: shapes[own] for own in names}
    model = empty_model(ImageTokenizer, config, shapes, str(directory), sizes)
    read_weights(model, weights, names, str(directory), dtype=dtype, device=device, wide=WIDE)
    return model.eval()
