"""Which pixel decoder a folder holds."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from clipflow.models.blip3o.feature_decoder import MODEL_TYPE, FeatureDecoder
from clipflow.models.blip3o.sdxl_decoder import SDXLDecoder
<<<<<<< HEAD
from clipflow.models.folders.checkpoint import CONFIG_FILE, read_config
from clipflow.models.folders.shapes import Shape
=======
from clipflow.models.folders.checkpoint import CONFIG_FILE, open_weights, read_config
>>>>>>> model

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


<<<<<<< HEAD
def stored_tensors(folder: str | Path) -> dict[str, tuple[Shape, torch.dtype]]:
    """Shape and stored dtype of each tensor of the decoder in `folder`, as names of a model.

    Raises:
        FileNotFoundError, ValueError: as `load_decoder`, but for the values of the weights.
    """
    if (Path(folder) / CONFIG_FILE).exists():
        weights = FeatureDecoder.meta(folder)
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
=======
def decoder_parameters(folder: str | Path) -> dict[torch.dtype, int]:
    """How many parameters the decoder in `folder` has, by the dtype that they are stored in.

    Only headers are read.

    Raises:
        FileNotFoundError, ValueError: as `load_decoder`.
    """
    if (Path(folder) / CONFIG_FILE).exists():
        weights = open_weights(folder)
        held = [(weights, weights.shapes)]
    else:
        found = SDXLDecoder.meta(folder)
        held = [(found.weights[part], names.values()) for part, names in found.names.items()]
    counts: dict[torch.dtype, int] = {}
    for weights, names in held:
        for name in names:
            dtype = weights.dtypes[name]
            counts[dtype] = counts.get(dtype, 0) + math.prod(weights.shapes[name])
    return counts
>>>>>>> model
