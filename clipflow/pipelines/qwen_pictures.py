"""Pictures as Qwen2.5-VL sees them: at about their own size and shape, cut into patches.

A picture is resized to whole squares of `patch_size * merge_size` pixels, so that it has no more
than `max_pixels` and no fewer than `min_pixels`; each such square is one token.

Source: Bai et al., "Qwen2.5-VL Technical Report" (2025), section 2.1.1; transformers' processor.
"""

# Shape suffixes: N = patches, T = frames in a patch, P = side of a patch.

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from clipflow.errors import InputError
from clipflow.models.language.positions import Grid
from clipflow.pipelines.image_processor import FILE_NAME, ImageProcessor
from clipflow.pipelines.picture_sets import PictureSet

if TYPE_CHECKING:
    from transformers import Qwen2VLImageProcessorPil

    from clipflow.models.blip3o.config import BLIP3oConfig

# Of Qwen2.5-VL, where a folder does not say; but a picture leaves half of a prompt to the words.
MIN_TOKENS, MAX_TOKENS = 4, 16384
STEPS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True, kw_only=True)
class QwenImageProcessor(ImageProcessor):
    """Pictures to be read, at their own shape; to be edited, as `ImageProcessor` makes them.

    Attributes:
        patch_size: P, in pixels.
        temporal_patch_size: T; a picture is so many equal frames.
        merge_size: patches per axis that are one token.
        min_pixels: smaller pictures are enlarged to this area.
        max_pixels: larger ones are reduced to it.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def from_config(cls, config: BLIP3oConfig) -> QwenImageProcessor:
        token = config.vision.feature_pixels**2
        most = max(MIN_TOKENS, min(MAX_TOKENS, config.text.max_position_embeddings // 2))
        return cls(
            size=config.image_size,
            mean=config.image_mean,
            std=config.image_std,
            patch_size=config.vision.patch_size,
            temporal_patch_size=config.vision.temporal_patch_size,
            merge_size=config.vision.spatial_merge_size,
            min_pixels=MIN_TOKENS * token,
            max_pixels=most * token,
        )

    @classmethod
    def from_folder(cls, folder: Path, config: BLIP3oConfig) -> QwenImageProcessor:
        """Read Qwen's `preprocessor_config.json`; where it is missing, Qwen2.5-VL's values.

        Raises:
            InputError: the file is there, but cannot be read, has other keys or senseless values,
                or other patches than the model.
        """
        own, path = cls.from_config(config), folder / FILE_NAME
        if not path.exists():
            return own
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            size = values.get("size") or {}
            found = dataclasses.replace(
                own,
                mean=tuple(float(v) for v in values.get("image_mean", own.mean)),
                std=tuple(float(v) for v in values.get("image_std", own.std)),
                resample=int(values.get("resample", own.resample)),
                min_pixels=values.get("min_pixels", size.get("shortest_edge", own.min_pixels)),
                max_pixels=values.get("max_pixels", size.get("longest_edge", own.max_pixels)),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: must be that of Qwen2.5-VL, of min_pixels and max_pixels: {error!r}"
            ) from error
        found._check(config, path)
        found._check_pixels(path)
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            wanted, other = getattr(own, name), values.get(name, getattr(own, name))
            if other != wanted:
                raise InputError(f"{path}: {name} must be the model's, {wanted}, got {other!r}")
        for name in STEPS:
            if values.get(name, True) is not True:
                raise InputError(f"{path}: {name} must be true, got {values[name]!r}")
        return found

    def to_json(self) -> str:
        """The text of a `preprocessor_config.json`, which transformers reads, too."""
        values = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            **dict.fromkeys(STEPS, True),
            "resample": self.resample,
            "rescale_factor": 1 / 255,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
        }
        return json.dumps(values, indent=2) + "\n"

    def grid(self, image: Image.Image) -> Grid:
        """(rows, columns) of the tokens of `image`.

        Raises:
            InputError: it is more than 200 times as long as wide.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        step = self.patch_size * self.merge_size
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        try:
            height, width = smart_resize(image.height, image.width, step, **limits)
        except ValueError as error:
            raise InputError(
                "the image must be at most 200 times as long as wide, "
                f"got {image.width} x {image.height}"
            ) from error
        return height // step, width // step

    def patches(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """What the vision tower reads of an RGB `image`.

        Returns:
            (patches [N, 3 * T * P * P] float32 on the CPU, grid_thw [1, 3] int64: 1 and the rows
            and columns of patches). The patches of a token follow each other.
        """
        read = _library(self)(
            images=[image], return_tensors="pt", input_data_format="channels_last"
        )
        return read["pixel_values"].to(torch.float32), read["image_grid_thw"]

    def within(self, max_pixels: int | None) -> QwenImageProcessor:
        """The same for pictures of at most `max_pixels`, if given.

        Raises:
            InputError: that is less than a token.
        """
        if max_pixels is None:
            return self
        least = (self.patch_size * self.merge_size) ** 2
        if type(max_pixels) is not int or max_pixels < least:
            raise InputError(
                f"max_pixels must be a whole number of at least {least}, got {max_pixels!r}"
            )
        fewer = min(self.min_pixels, max_pixels)
        return dataclasses.replace(self, min_pixels=fewer, max_pixels=max_pixels)

    def _check_pixels(self, path: Path) -> None:
        least, most = self.min_pixels, self.max_pixels
        if not all(type(value) is int for value in (least, most)) or not 0 < least <= most:
            raise InputError(
                f"{path}: min_pixels and max_pixels must be whole numbers from 1 on in this "
                f"order, got {least!r} and {most!r}"
            )


class WholeSet(PictureSet):
    """Pictures at their own shape; the size of one is how many tokens it has.

    One at a time is seen: a feature's bits do not depend on the pictures beside it.
    """

    processor: QwenImageProcessor
    at_once = 1

    @property
    def grids(self) -> list[Grid]:
        return [self.processor.grid(picture) for picture in self.pictures]

    def cut(self, image: Image.Image) -> list[Image.Image]:
        return [image]

    def size(self, places: Sequence[int]) -> int:
        return sum(math.prod(self.processor.grid(self.pictures[place])) for place in places)

    def features(self, model: nn.Module, places: Sequence[int]) -> Sequence[Tensor]:
        return [
            model.encode_patches(*self.processor.patches(self.pictures[place])) for place in places
        ]


@lru_cache(maxsize=8)
def _library(processor: QwenImageProcessor) -> Qwen2VLImageProcessorPil:
    """Transformers' own, which needs no torchvision."""
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
        image_mean=list(processor.mean),
        image_std=list(processor.std),
        resample=processor.resample,
        patch_size=processor.patch_size,
        temporal_patch_size=processor.temporal_patch_size,
        merge_size=processor.merge_size,
    )
