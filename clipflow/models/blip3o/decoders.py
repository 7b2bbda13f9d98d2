"""Which pixel decoder a folder holds."""

from __future__ import annotations

from pathlib import Path

import torch

from clipflow.models.blip3o.feature_decoder import MODEL_TYPE, FeatureDecoder
from clipflow.models.blip3o.sdxl_decoder import SDXLDecoder
from clipflow.models.blip3o.sdxl_folder import SDXLFolder
from clipflow.models.folders.checkpoint import CONFIG_FILE, read_config
from clipflow.models.folders.shapes import Shape

FOLDER = "diffusion-decoder"

PixelDecoder = SDXLDecoder | FeatureDecoder


def load_decoder(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PixelDecoder:
    """The decoder in `folder`, which a model's folder has as `diffusion-decoder`.

    A config.json in it says that it is a `FeatureDecoder`; published ones have none there.

    Raises:
        FileNotFoundError, ValueError: as `from_folder` of both.
    """
    if (Path(folder) / CONFIG_FILE).exists():
        found = read_config(folder).get("model_type")
        if found != MODEL_TYPE:
            raise ValueError(
                f"load: {Path(folder) / CONFIG_FILE} must have the model_type {MODEL_TYPE!r}, "
                f"got {repr(found)[:80]}"
            )
        return FeatureDecoder.from_folder(folder, dtype=dtype, device=device)
    return SDXLDecoder.from_folder(folder, dtype=dtype, device=device)


def describe_decoder(folder: str | Path) -> SDXLFolder | FeatureDecoder:
    """The decoder in `folder` without memory for its weights.

    Raises:
        FileNotFoundError, ValueError: as `load_decoder`, but for the values of the weights.
    """
    if (Path(folder) / CONFIG_FILE).exists():
        return FeatureDecoder.meta(folder)[0]
    return SDXLDecoder.meta(folder)


def stored_tensors(folder: str | Path) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shape and stored dtype of each tensor of the decoder in `folder`, as names of a model.

    Raises:
        FileNotFoundError, ValueError: as `load_decoder`, but for the values of the weights.
    """
    if (Path(folder) / CONFIG_FILE).exists():
        _, weights = FeatureDecoder.meta(folder)
        return {
            f"decoder.{name}": (shape, weights.dtypes[name])
            for name, shape in weights.shapes.items()
        }
    found = SDXLDecoder.meta(folder)
    return {
        f"decoder.{part}.{own}": (
            found.weights[part].shapes[name],
            found.weights[part].dtypes[name],
        )
        for part, names in found.names.items()
        for own, name in names.items()
    }
