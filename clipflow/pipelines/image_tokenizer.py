"""UniLIPTokenizer: pictures to latents and back, without a language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipflow.errors import InputError
from clipflow.models.unilip.image_codec import ImageTokenizer
from clipflow.models.unilip.tokenizer_folder import load_image_tokenizer, save_image_tokenizer
from clipflow.pipelines.arguments import listed
from clipflow.pipelines.image_io import ImageInput, write_atomically
from clipflow.pipelines.image_processor import FILE_NAME as PROCESSOR_FILE
from clipflow.pipelines.image_processor import ImageProcessor
from clipflow.pipelines.model_folders import find_model
from clipflow.pipelines.options import check_output_type
from clipflow.pipelines.output import CLIPFlowPipelineOutput, Pictures
from clipflow.pipelines.reconstruction import Canvas

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class UniLIPTokenizer:
    """UniLIP's tokenizer of pictures: CLIP features, compressed to latents, drawn by DC-AE.

    All calls run without gradients; `model` is what to train.

    Attributes:
        model: `clipflow.models.unilip.image_codec.ImageTokenizer`.
        image_processor: what resizes and normalizes pictures.
    """

    def __init__(
        self, model: ImageTokenizer, *, image_processor: ImageProcessor | None = None
    ) -> None:
        self.model = model.eval()
        self.image_processor = image_processor or ImageProcessor.from_config(model.config)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = torch.float32,
        local_files_only: bool = True,
    ) -> Self:
        """Load a tokenizer.

        Args:
            name: a folder that `clipflow convert --from unilip-tokenizer` wrote, or anything that
                `CLIPFlowPipeline.from_pretrained` takes: of a whole model only the tokenizer's
                parts are read.
            device: where to put it; the CPU when not given.
            dtype: of the vision tower, "auto" or None as stored; the decoder is float32 always.
            local_files_only: False allows a hub name to be downloaded.

        Raises:
            InputError: there is no such folder, or it is not complete.
        """
        folder = find_model(name, local_files_only=local_files_only)
        dtype = None if dtype == "auto" else dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f'dtype must be a floating point torch.dtype or "auto", got {dtype!r}')
        try:
            model = load_image_tokenizer(folder, dtype=dtype, device=device or "cpu")
        except (ValueError, OSError) as error:
            raise InputError(f"{folder}: the tokenizer cannot be read: {error}") from error
        processor = ImageProcessor.from_folder(folder, model.config)
        return cls(model, image_processor=processor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything that `from_pretrained` reads; weights come back bitwise."""
        save_image_tokenizer(self.model, folder)
        text = self.image_processor.to_json()
        write_atomically(Path(folder) / PROCESSOR_FILE, lambda file: file.write(text.encode()))

    @property
    def device(self) -> torch.device:
        return self.model.vision_tower.embeddings.class_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.vision_tower.embeddings.class_embedding.dtype

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move the model and set its dtype, in place; the decoder stays float32."""
        for name, part in self.model.named_children():
            part.to(device=device, dtype=torch.float32 if name == "vae_decoder" else dtype)
        return self

    @torch.no_grad()
    def encode(
        self, image: ImageInput | Sequence[ImageInput], *, resolution: int | None = None
    ) -> Tensor:
        """Latents of pictures, [B, C, h, w] float32 on `device`.

        They are not scaled: the pipeline's are these times `unilip_factor`.

        Args:
            image: a picture or a list: paths, PIL images, arrays or tensors.
            resolution: as of `CLIPFlowPipeline.reconstruct`.

        Raises:
            InputError: a picture that cannot be read, or a resolution that cannot be.
            NotEnoughMemory: the pictures do not fit into memory at that resolution.
        """
        return self._encode(listed(image), self._canvas(resolution))

    @torch.no_grad()
    def decode(
        self, latents: Tensor, *, resolution: int | None = None, output_type: str = "pil"
    ) -> Pictures:
        """Pictures of latents.

        Args:
            latents: [B, C, h, w] as of `encode`.
            resolution: what `encode` had; latents of another grid than that are refused.
            output_type: "pil", "np" or "pt".

        Raises:
            InputError: an unknown output type, or latents of another shape.
            NotEnoughMemory: the pictures do not fit into memory.
        """
        _check_drawn(output_type)
        canvas = self._canvas(resolution)
        grid = canvas.seen // canvas.step
        wanted = [self.model.config.decoder.latent_channels, grid, grid]
        if latents.ndim != 4 or list(latents.shape[1:]) != wanted:
            raise InputError(
                f"latents must be [B, C, h, w] = [B, *{wanted}], got {list(latents.shape)}"
            )
        decoded = self.model.decode(latents.to(self.device, torch.float32))
        return canvas.pictures(decoded, output_type)

    @torch.no_grad()
    def reconstruct(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        resolution: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> CLIPFlowPipelineOutput | tuple[Pictures]:
        """Draw pictures again; arguments and errors are those of `CLIPFlowPipeline.reconstruct`.

        Latents ("latent") are not scaled.
        """
        check_output_type(output_type)
        canvas = self._canvas(resolution)
        latents = self._encode(listed(image), canvas)
        if output_type == "latent":
            pictures = latents
        else:
            pictures = canvas.pictures(self.model.decode(latents), output_type)
        return CLIPFlowPipelineOutput(pictures) if return_dict else (pictures,)

    def _canvas(self, resolution: int | None) -> Canvas:
        return Canvas.of(resolution, self.model.config)

    def _encode(self, images: Sequence[ImageInput], canvas: Canvas) -> Tensor:
        canvas.require_memory(len(images), self.model.config, self.dtype, self.device)
        pixels = canvas.pixel_values(images, self.image_processor).to(self.device, self.dtype)
        return self.model.clip_down(self.model.encode_image(pixels).float())


def _check_drawn(output_type: str) -> None:
    check_output_type(output_type)
    if output_type == "latent":
        raise InputError("output_type must be one of pil, np, pt to decode latents, got 'latent'")
