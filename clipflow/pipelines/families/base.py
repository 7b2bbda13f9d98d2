"""What a pipeline asks of the family of its model; all that the families share lives elsewhere.

A family has no state: what belongs to one model is in the pipeline, which is handed in.

    encode(prompts, pictures) -> conditions
    dit(latents, time, condition) -> velocity          (the model's own; see `sampling`)
    draw(latents) -> pictures
"""

# Shape suffixes: B = pictures, C = latent channels, h, w = the latent grid, L = condition tokens.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from clipflow.errors import InputError
from clipflow.models.folders.loading import FolderFormat
from clipflow.models.folders.parts import Parts
from clipflow.models.folders.shapes import Shape
from clipflow.pipelines.generation_defaults import GenerationDefaults
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.image_processor import ImageProcessor
from clipflow.pipelines.options import Generators, PictureSize, SamplingOptions
from clipflow.pipelines.output import Pictures
from clipflow.sampling import FlowSchedule, flow_schedule

if TYPE_CHECKING:
    from clipflow.pipelines.memory_calls import CallShape
    from clipflow.pipelines.memory_estimate import MemoryEstimate
    from clipflow.pipelines.parts import PipelineParts
    from clipflow.pipelines.prompts import Prompts
    from clipflow.pipelines.readers import Reader


class Conditions(NamedTuple):
    """Of each picture of a call, [L, channels]; `null` is empty where nothing is guided."""

    cond: list[Tensor]
    null: list[Tensor]


class Family(ABC):
    """One family of models.

    Attributes:
        name: what it is called.
        folder_format: how its folders are read.
        parts: of its parameters, for counts; the diffusion transformer is "DiT".
        wide: those of `parts` that are float32 in every dtype.
        wide_modules: the same as children of the model.
        shown_parts: those of `parts` under fewer names, for bytes.
        language, decoder: children of the model that read prompts, and that draw: what waits on
            the CPU where a model is offloaded.
        condition_parts: what conditions depend on.
        feature_parts: what the features of pictures that are asked about depend on.
        own_options: options of calls that only some families have; see `decoding`.
        default_solver: where neither the call nor the folder says.
    """

    name: ClassVar[str]
    folder_format: ClassVar[FolderFormat]
    parts: ClassVar[Parts]
    wide: ClassVar[tuple[str, ...]]
    wide_modules: ClassVar[tuple[str, ...]]
    shown_parts: ClassVar[Parts]
    language: ClassVar[tuple[str, ...]]
    decoder: ClassVar[tuple[str, ...]]
    condition_parts: ClassVar[tuple[str, ...]]
    feature_parts: ClassVar[tuple[str, ...]]
    own_options: ClassVar[tuple[str, ...]] = ()
    default_solver: ClassVar[str] = "dpmpp_2m"

    @property
    @abstractmethod
    def model_class(self) -> type[nn.Module]:
        """Of its models; takes a configuration, has `from_pretrained` and `save_pretrained`."""

    @abstractmethod
    def skipped_names(self, names: Iterable[str]) -> dict[str, int]:
        """What a checkpoint holds besides the model, and in how many tensors."""

    @abstractmethod
    def describe(self, config: Any) -> dict[str, str]:
        """The architecture in words: part -> a line."""

    @abstractmethod
    def check_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, config: Any, folder: Path
    ) -> None:
        """Raise InputError where the tokenizer is not the one that the model was trained with."""

    @abstractmethod
    def prompts(self, tokenizer: PreTrainedTokenizerBase, config: Any) -> Prompts:
        """The family's templates."""

    @abstractmethod
    def reader(self, pipeline: PipelineParts) -> Reader | None:
        """What reads conversations; None where the family has none."""

    @abstractmethod
    def finish(self, model: nn.Module, device: torch.device) -> None:
        """Compute again, in float32, the tables that `to` may have rounded."""

    @abstractmethod
    def estimate(
        self, config: Any, counts: Mapping[str, int], call: CallShape, decoder: object
    ) -> MemoryEstimate:
        """Memory of a call of a model with `counts` parameters in each part.

        Args:
            config, counts, call: what is estimated.
            decoder: of the model, or what `decoder_in` found in its folder.
        """

    def decoder_in(self, folder: Path) -> object:
        """What the headers of a folder say of a decoder of its own; None where there is none."""
        return None

    def cannot(self, call: str, model: nn.Module) -> str | None:
        """Why `model` has no `call` (a method of the pipeline); None where it has."""
        return None

    def decoder_tensors(self, folder: Path) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and stored dtype of each tensor of a decoder that is in a folder of its own.

        Raises:
            FileNotFoundError, ValueError: it is broken, but for the values of its weights.
        """
        return {}

    def require(self, call: str, model: nn.Module) -> None:
        """Raise InputError where `model` has no `call`."""
        reason = self.cannot(call, model)
        if reason is not None:
            raise InputError(f"{call}: {reason}")

    def check_own(self, options: Mapping[str, object], model: nn.Module) -> None:
        """Raise InputError where one of `options` is given and `model` has none of that name."""
        for name, value in options.items():
            if value is not None and name not in self.own_options:
                raise InputError(f"{name} must not be given for {self.name}, which has none")

    def image_processor(self, folder: Path | None, config: Any) -> ImageProcessor | None:
        """What resizes and normalizes pictures; None where the family sees none."""
        if folder is None:
            return ImageProcessor.from_config(config)
        return ImageProcessor.from_folder(folder, config)

    def generation_defaults(self, folder: Path | None, config: Any) -> GenerationDefaults:
        """What calls do that do not say."""
        steps, solver = self.default_steps(config), self.default_solver
        return GenerationDefaults.from_folder(folder, config, steps=steps, solver=solver)

    def default_steps(self, config: Any) -> int:
        """Of sampling, where neither the call nor generation_config.json says."""
        return config.default_steps

    def schedule(self, config: Any, steps: int) -> FlowSchedule:
        """Noise levels and model times of a run."""
        return flow_schedule(steps, shift=config.flow_shift)

    def picture_size(self, height: int | None, width: int | None, config: Any) -> PictureSize:
        """The size of a picture of `height` x `width` pixels; None for both is the native size.

        Raises:
            InputError: a side that the decoder cannot draw.
        """
        if height is None and width is None:
            return PictureSize(config.latent_side, config.latent_side, native=True)
        factor = config.decoder.upscale
        sides = [
            _side(name, side, factor) // factor
            for name, side in (("height", height), ("width", width))
        ]
        return PictureSize(*sides, native=False)

    def encode(
        self,
        pipeline: PipelineParts,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        pixels: Tensor | None,
        options: SamplingOptions,
    ) -> Conditions:
        """Conditions of every picture of a call.

        Args:
            pipeline: that is called.
            prompts: what to draw, or how to edit.
            negatives: what to steer away from, for each prompt; None is the null prompt.
            pixels: pictures to edit, one for each prompt, as the image processor makes them.
            options: of the call.
        """
        texts = [*prompts, *(negatives if options.guided else [])]
        alone = options.batch_invariant
        if pixels is None:
            found = pipeline.conditions.text_to_image(texts, one_by_one=alone)
        else:
            pixels = torch.cat([pixels] * (len(texts) // len(prompts)))
            found = pipeline.conditions.edit(pixels, texts, one_by_one=alone)
        each = options.images // len(prompts)
        rows = [condition for condition in found for _ in range(each)]
        return Conditions(rows[: options.images], rows[options.images :])

    @abstractmethod
    def draw(
        self,
        pipeline: PipelineParts,
        latents: Tensor,
        size: PictureSize,
        options: SamplingOptions,
        generator: Generators,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in about [-1, 1] of sampled latents [B, C, h, w], of one size.

        Args:
            pipeline: that is called.
            latents: as sampled.
            size: of the pictures.
            options: of the call.
            generator: of these pictures; their starting noise has been drawn from it.
        """

    @abstractmethod
    def reconstruct(
        self,
        pipeline: PipelineParts,
        images: Sequence[ImageInput],
        resolution: int | None,
        output_type: str,
    ) -> Pictures:
        """`images` drawn again from their features; see `CLIPFlowPipeline.reconstruct`."""


def _side(name: str, side: object, factor: int) -> int:
    whole = isinstance(side, int) and not isinstance(side, bool)
    if not whole or side < factor or side % factor:
        raise InputError(
            f"{name} must be a multiple of {factor} pixels, at least {factor}, got {side!r}"
        )
    return side
