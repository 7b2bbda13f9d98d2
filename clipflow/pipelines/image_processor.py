"""Pictures to pixel values for the vision tower, and decoded pixels to pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipflow.errors import InputError
from clipflow.models.unilip.pixel_decoder import resize_pictures
from clipflow.pipelines.image_io import ImageInput, load_image
from clipflow.pipelines.output import Pictures

FILE_NAME = "preprocessor_config.json"
CROPS = ("none", "before", "after")
# Longer pictures are cut to this many times their shorter side before they are resized.
MOST_ASPECT = 16


class PictureConfig(Protocol):
    """What a configuration says of the pictures that a model sees."""

    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """RGB, made a square, normalized per channel.

    Attributes:
        size: side of the square, in pixels.
        mean: subtracted from pixels in [0, 1].
        std: divides after that.
        resample: Pillow's filter number; 3 is bicubic.
        crop: "none" squashes the picture into the square; "before" cuts out the square in its
            middle and resizes that (BLIP3-o's reconstruction, specs section A.9); "after" resizes
            the shorter side to `size` and cuts out the middle (its training targets, section A.6).

    Raises:
        InputError: another `crop`.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = int(Image.Resampling.BICUBIC)
    crop: str = "none"

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise InputError(f"crop must be one of {', '.join(CROPS)}, got {self.crop!r}")

    @classmethod
    def from_config(cls, config: PictureConfig) -> ImageProcessor:
        return cls(size=config.image_size, mean=config.image_mean, std=config.image_std)

    @classmethod
    def from_folder(cls, folder: Path, config: PictureConfig) -> ImageProcessor:
        """Read `preprocessor_config.json`; where it is missing, the model's own configuration.

        Raises:
            InputError: the file is there, but cannot be read, has other keys or senseless values.
        """
        path = folder / FILE_NAME
        if not path.exists():
            return cls.from_config(config)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            size = values["size"]
            found = cls(
                size=int(size["height"] if isinstance(size, dict) else size),
                mean=tuple(float(v) for v in values["image_mean"]),
                std=tuple(float(v) for v in values["image_std"]),
                resample=int(values.get("resample", cls.resample)),
                crop=values.get("crop", cls.crop),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path}: must hold size, image_mean and image_std: {error!r}"
            ) from error
        found._check(config, path)
        return found

    def _check(self, config: PictureConfig, path: Path) -> None:
        if self.size != config.image_size:
            raise InputError(f"{path}: size must be {config.image_size}, got {self.size}")
        numbers = [*self.mean, *self.std]
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, numbers)):
            raise InputError(f"{path}: image_mean and image_std must be 3 numbers, got {numbers}")
        if min(self.std) <= 0:
            raise InputError(f"{path}: image_std must be above 0, got {list(self.std)}")
        if self.resample not in list(Image.Resampling):
            raise InputError(f"{path}: resample must be from 0 to 5, got {self.resample}")

    def to_json(self) -> str:
        """The text of a `preprocessor_config.json`, which `from_folder` reads."""
        values = {
            "image_processor_type": "CLIPFlowImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.crop != "none":
            values["crop"] = self.crop
        return json.dumps(values, indent=2) + "\n"

    def __call__(self, images: Sequence[ImageInput]) -> Tensor:
        """Pixel values of `images`, [B, 3, size, size] float32 on the CPU."""
        rows = [np.asarray(self.resize(load_image(image))) for image in images]
        pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def resize(self, image: Image.Image) -> Image.Image:
        """`image` at the model's own size: what the model sees."""
        width, height = image.size
        shorter = min(width, height)
        if self.crop == "before":
            image = _middle(image, shorter, shorter)
        elif self.crop == "after":
            longest = MOST_ASPECT * shorter
            image = _middle(image, min(width, longest), min(height, longest))
            sides = [int(self.size * side / shorter) for side in image.size]
            return _middle(self._resized(image, *sides), self.size, self.size)
        return self._resized(image, self.size, self.size)

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if image.size == (width, height):
            return image
        return image.resize((width, height), Image.Resampling(self.resample))


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of `image`; of two equally central ones, the one torchvision's crop takes."""
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def postprocess(decoded: Tensor, output_size: int | None, output_type: str) -> Pictures:
    """Decoded pixels [B, 3, S, S] in about [-1, 1] to pictures of side `output_size`, if given.

    Clamped, then resized bilinearly (half-pixel centers, no antialiasing), then rounded for "pil".
    """
    pixels = (decoded.float() / 2 + 0.5).clamp(0, 1)
    pixels = (pixels if output_size is None else resize_pictures(pixels, output_size)).cpu()
    if output_type == "pt":
        return pixels
    rows = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    if output_type == "np":
        return rows
    return [Image.fromarray(row) for row in np.rint(rows * 255).astype(np.uint8)]
