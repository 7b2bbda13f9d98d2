"""Pictures drawn again from their features, at the model's own size or at another one.

A side that the vision tower can cut into features is seen as it is. Any other is padded by
reflection to the next that it can, drawn with its margins, and cut (specs of UniLIP, section 1d).
"""

# Shape suffixes: B = batch, C = latent channels, h, w = the latent grid, S, R = sides in pixels.

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clipflow.errors import InputError
from clipflow.models.unilip.config import UniLIPConfig
from clipflow.models.unilip.image_codec import TokenizerConfig
from clipflow.models.unilip.pixel_decoder import resize_pictures
from clipflow.pipelines.activations import decode_activations, vision_activations
from clipflow.pipelines.arguments import positive
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.image_processor import ImageProcessor, postprocess
from clipflow.pipelines.output import Pictures
from clipflow.sampling.memory import require_bytes

Config = UniLIPConfig | TokenizerConfig


@dataclass(frozen=True)
class Canvas:
    """The square that a picture is seen and drawn on.

    Attributes:
        resolution: what was asked for; None leaves the size of pictures to the image processor.
        side: of the picture, in pixels.
        step: pixels between two features; `seen` is a multiple of it.
        upscale: pixels that the decoder draws for a feature.
        shown: side of the picture that is handed out.
    """

    resolution: int | None
    side: int
    step: int
    upscale: int
    shown: int

    @classmethod
    def of(cls, resolution: int | None, config: Config) -> Canvas:
        """The canvas for pictures of `resolution` pixels; None is the model's own size.

        What is handed out is as much larger or smaller as it is at the model's own size.

        Raises:
            InputError: `resolution` is no number of pixels, or too few to be padded by reflection.
        """
        step = config.vision.shuffle * config.vision.patch_size
        size, upscale = config.image_size, config.decoder.upscale
        side = size if resolution is None else positive("resolution", resolution)
        shown = max(1, round(side * config.output_size / size))
        canvas = cls(resolution, side, step, upscale, shown)
        if max(canvas.margins) >= side:
            sides = (dataclasses.replace(canvas, side=s) for s in range(side, step + 1))
            least = next(c.side for c in sides if max(c.margins) < c.side)
            raise InputError(f"resolution must be at least {least} pixels, got {side}")
        return canvas

    @property
    def seen(self) -> int:
        """Side with margins."""
        return -(-self.side // self.step) * self.step

    @property
    def margins(self) -> tuple[int, int]:
        """Pixels before (above, on the left) and after the picture."""
        missing = self.seen - self.side
        return missing // 2, missing - missing // 2

    def pixel_values(self, images: Sequence[ImageInput], processor: ImageProcessor) -> Tensor:
        """What the vision tower sees, [B, 3, seen, seen] float32 on the CPU."""
        if self.resolution is not None:
            processor = dataclasses.replace(processor, size=self.side)
        pixels = processor(images)
        before, after = self.margins
        if not after:
            return pixels
        # Normalizing is the same for all pixels of a channel, so that it may come first.
        return F.pad(pixels, (before, after, before, after), mode="reflect")

    def pictures(self, decoded: Tensor, output_type: str) -> Pictures:
        """`decoded` [B, 3, S, S] without margins, at the size `shown`, as `output_type`."""
        before, after = self.margins
        if not after:
            return postprocess(decoded, self.shown, output_type)
        scale = self.shown / self.side
        first = round(before * scale)
        whole = resize_pictures(decoded.float(), round(self.seen * scale), align_corners=True)
        cut = slice(first, first + self.shown)
        return postprocess(whole[..., cut, cut], None, output_type)

    def require_memory(
        self, pictures: int, config: Config, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raise NotEnoughMemory where `pictures` at once cannot be seen and drawn on `device`."""
        grid = self.seen // self.step
        vision = dataclasses.replace(config.vision, image_size=self.seen)
        seeing = vision_activations(vision, pictures, dtype)
        drawing = decode_activations(config.decoder, (pictures, grid, grid), device)
        what = f"reconstructing {pictures} pictures of {self.side} x {self.side} pixels"
        require_bytes(max(seeing, drawing), device, what)
