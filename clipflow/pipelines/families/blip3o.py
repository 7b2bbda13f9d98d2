"""BLIP3-o: Qwen2.5-VL and queries, Lumina-Next over CLIP features, a decoder of features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from clipflow.errors import InputError
from clipflow.models.blip3o import BLIP3oConfig, BLIP3oModel
from clipflow.models.blip3o.decoders import FOLDER as DECODER_FOLDER
from clipflow.models.blip3o.decoders import describe_decoder, stored_tensors
from clipflow.models.blip3o.keys import skipped_names
from clipflow.models.blip3o.loading import folder_format
from clipflow.models.blip3o.memory import eva_activations
from clipflow.models.blip3o.qwen import materialize_rotary
from clipflow.models.blip3o.sizes import PARTS
from clipflow.models.folders.shapes import Shape
from clipflow.pipelines.blip3o_prompts import BLIP3oPrompts
from clipflow.pipelines.decoding import FeatureDecoding
from clipflow.pipelines.families.base import Conditions, Family
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.image_processor import ImageProcessor, postprocess
from clipflow.pipelines.memory_calls import CallShape, blip3o_estimate
from clipflow.pipelines.memory_estimate import MemoryEstimate
from clipflow.pipelines.offload import DECODER, LANGUAGE
from clipflow.pipelines.options import Generators, PictureSize, SamplingOptions
from clipflow.pipelines.output import Pictures
from clipflow.pipelines.qwen_pictures import QwenImageProcessor
from clipflow.pipelines.readers import WholeReader
from clipflow.pipelines.tokenizer_files import check_tokenizer
from clipflow.sampling import FlowSchedule, euler_schedule
from clipflow.sampling.memory import require_bytes

if TYPE_CHECKING:
    from clipflow.pipelines.clipflow_pipeline import CLIPFlowPipeline
    from clipflow.pipelines.parts import PipelineParts

RECONSTRUCTION_SEED = 0
NO_DECODER = (
    'this BLIP3-o has no decoder, so it draws features only (output_type="latent"); its folder '
    "must hold one in diffusion-decoder/"
)
NO_EDITS = (
    "this BLIP3-o was trained to draw and to reconstruct pictures, not to edit them; "
    '"edits": true in its config.json tries it nevertheless'
)


class BLIP3o(Family):
    """The family of `clipflow.models.blip3o`."""

    name = "BLIP3-o"
    folder_format = folder_format()
    parts = PARTS
    wide = ()
    wide_modules = ()
    shown_parts: ClassVar = {
        "vision tower": ("vision tower",),
        "language model": ("language model", "lm_head"),
        "queries": ("queries",),
        "CLIP target": ("CLIP target",),
        "DiT": ("DiT",),
        "decoder": ("decoder",),
    }
    language = ("visual", "language_model", "lm_head", "clip_target")
    decoder = ("decoder",)
    condition_parts = ("visual", "language_model", "latent_queries")
    feature_parts = ("visual",)
    own_options = ("decoding",)
    default_solver = "euler"

    @property
    def model_class(self) -> type[BLIP3oModel]:
        return BLIP3oModel

    def skipped_names(self, names: Iterable[str]) -> dict[str, int]:
        return skipped_names(names)

    def decoder_tensors(self, folder: Path) -> dict[str, tuple[Shape, torch.dtype]]:
        place = folder / DECODER_FOLDER
        return stored_tensors(place) if place.is_dir() else {}

    def decoder_in(self, folder: Path) -> object:
        place = folder / DECODER_FOLDER
        return describe_decoder(place) if place.is_dir() else None

    def cannot(self, call: str, model: nn.Module) -> str | None:
        return NO_EDITS if call == "edit" and not model.config.edits else None

    def check_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, config: BLIP3oConfig, folder: Path
    ) -> None:
        tokens = config.tokens
        wanted = {
            "<|im_end|>": tokens.im_end,
            "<|vision_start|>": tokens.vision_start,
            "<|vision_end|>": tokens.vision_end,
            "<|image_pad|>": tokens.image_pad,
            "[IMG]": tokens.image_start,
        }
        check_tokenizer(tokenizer, wanted, {}, config.text.vocab_size, folder)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, config: BLIP3oConfig) -> BLIP3oPrompts:
        return BLIP3oPrompts(tokenizer, config)

    def reader(self, pipeline: PipelineParts) -> WholeReader:
        return WholeReader(pipeline)

    def image_processor(self, folder: Path | None, config: BLIP3oConfig) -> QwenImageProcessor:
        if folder is None:
            return QwenImageProcessor.from_config(config)
        return QwenImageProcessor.from_folder(folder, config)

    def finish(self, model: nn.Module, device: torch.device) -> None:
        materialize_rotary(model, device)

    def schedule(self, config: BLIP3oConfig, steps: int) -> FlowSchedule:
        return euler_schedule(steps, shift=config.flow_shift)

    def estimate(
        self, config: BLIP3oConfig, counts: Mapping[str, int], call: CallShape, decoder: object
    ) -> MemoryEstimate:
        return blip3o_estimate(self, config, counts, call, decoder)

    def picture_size(
        self, height: int | None, width: int | None, config: BLIP3oConfig
    ) -> PictureSize:
        """The features are always as many; `height` and `width` are the decoder's."""
        side = config.latent_side
        if height is None and width is None:
            return PictureSize(side, side, native=True)
        for name, pixels in (("height", height), ("width", width)):
            if type(pixels) is not int or pixels < 8 or pixels % 8:
                raise InputError(f"{name} must be a multiple of 8 pixels, got {pixels!r}")
        return PictureSize(side, side, native=False, pixels=(height, width))

    def check_own(self, options: Mapping[str, object], model: nn.Module) -> None:
        super().check_own(options, model)
        guided = model.decoder is not None and model.decoder.guided
        if options.get("decoding") is not None and not guided:
            raise InputError(
                "decoding must not be given for this BLIP3-o, whose decoder takes no steps"
            )

    def draw(
        self,
        pipeline: PipelineParts,
        latents: Tensor,
        size: PictureSize,
        options: SamplingOptions,
        generator: Generators,
    ) -> Tensor:
        model, null = pipeline.model, None
        if model.decoder is None:
            raise InputError(NO_DECODER)
        decoding = options.decoding or FeatureDecoding()
        if model.decoder.guided and decoding.guidance_scale > 1:
            null = self._null_features(pipeline, decoding)
        with pipeline.offload.running(DECODER):
            return self._draw(pipeline, latents, null, decoding, generator, size.pixels)

    def reconstruct(
        self,
        pipeline: PipelineParts,
        images: Sequence[ImageInput],
        resolution: int | None,
        output_type: str,
    ) -> Pictures:
        """By the CLIP target where the model has it (specs section A.9), else as an edit is."""
        if resolution is not None:
            raise InputError(
                "resolution must not be given for BLIP3-o, which sees pictures to be drawn at "
                f"{pipeline.model.config.image_size} pixels, got {resolution!r}"
            )
        if pipeline.model.clip_target is None:
            return self._redraw(pipeline, images, output_type)
        latents, null = self._target(pipeline, images)
        if output_type == "latent":
            return latents
        with pipeline.offload.running(DECODER):
            drawn = self._draw(pipeline, latents, null, FeatureDecoding(), _dice(len(images)))
        return postprocess(drawn, pipeline.model.config.output_size, output_type)

    def describe(self, config: BLIP3oConfig) -> dict[str, str]:
        vision, text, dit = config.vision, config.text, config.dit
        side = config.latent_side
        facts = {
            "vision tower": f"Qwen2.5-VL, {vision.depth} layers, {vision.hidden_size} wide, "
            f"patches of {vision.patch_size} px, {vision.feature_pixels} px for a token",
            "language model": f"Qwen2.5-VL, {text.num_hidden_layers} layers, {text.hidden_size} "
            f"wide, {text.num_attention_heads}/{text.num_key_value_heads} heads, "
            f"{text.vocab_size} words",
            "queries": f"{config.n_query}",
            "DiT": f"Lumina-Next, {dit.num_layers} blocks, {dit.hidden_size} wide, "
            f"{side * side} tokens",
            "latents": f"CLIP features, {dit.in_channels} x {side} x {side}",
            "decoder": f"of features, {config.output_size} px",
            "guidance": f"{config.default_guidance_scale} by default, flow shift "
            f"{config.flow_shift}",
        }
        if config.target is not None:
            target = config.target
            facts["CLIP target"] = f"EVA-CLIP, {target.image_size} px, {target.hidden_size} wide"
        return facts

    def _draw(
        self,
        pipeline: PipelineParts,
        latents: Tensor,
        null: Tensor | None,
        decoding: FeatureDecoding,
        generator: Generators,
        pixels: tuple[int, int] | None = None,
    ) -> Tensor:
        decoder = pipeline.model.decoder
        if not decoder.guided:
            return decoder.draw(latents)
        height, width = pixels or (pipeline.model.config.output_size,) * 2
        return decoder.draw(
            latents,
            null,
            num_inference_steps=decoding.num_inference_steps,
            guidance_scale=decoding.guidance_scale if null is not None else 1.0,
            height=height,
            width=width,
            generator=generator,
        )

    def _null_features(self, pipeline: CLIPFlowPipeline, decoding: FeatureDecoding) -> Tensor:
        """What the decoder's guidance steers away from, [1, C, h, w]."""
        shape = pipeline.model.latent_shape
        if decoding.null == "zero":
            return torch.zeros(1, *shape, device=pipeline.device)

        def sample() -> Tensor:
            generator = torch.Generator().manual_seed(decoding.null_seed)
            options = pipeline.sampling_options(1, generator=generator, output_type="latent")
            cond = pipeline.conditions.written([pipeline.prompts.text_to_image(None)])
            null = pipeline.conditions.text_to_image([None])
            latents, _ = pipeline.pictures(
                Conditions(cond, null if options.guided else []), options
            )
            return latents

        name = ("null features", decoding.null_seed, pipeline.plans.weights())
        return pipeline.conditions.constant(name, sample)

    def _target(
        self, pipeline: PipelineParts, images: Sequence[ImageInput]
    ) -> tuple[Tensor, Tensor]:
        """Features [B, C, h, w] of pictures, and of one that is the mean color, [1, C, h, w]."""
        config = pipeline.model.config
        processor = ImageProcessor(
            size=config.target.image_size,
            mean=config.image_mean,
            std=config.image_std,
            crop="before",
        )
        pixels = processor(images)
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])])
        needed = eva_activations(config.target, len(pixels), pipeline.dtype)
        require_bytes(needed, pipeline.device, f"seeing {len(images)} pictures")
        with pipeline.offload.running(LANGUAGE):
            target = pipeline.model.clip_target
            features = target.target(pixels.to(pipeline.device, pipeline.dtype)).float()
        return features[:-1], features[-1:]

    def _redraw(
        self, pipeline: CLIPFlowPipeline, images: Sequence[ImageInput], output_type: str
    ) -> Pictures:
        """Sampled with the prompt that asks for the same picture; each from the same noise."""
        dice = _dice(len(images))
        options = pipeline.sampling_options(len(images), generator=dice, output_type=output_type)
        pixels = pipeline.image_processor(images)
        cond = pipeline.conditions.written(
            [pipeline.prompts.edit(None)] * len(images), pixel_values=pixels
        )
        null = pipeline.conditions.text_to_image([None]) * len(images) if options.guided else []
        return pipeline.pictures(Conditions(cond, null), options)[0]


def _dice(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(RECONSTRUCTION_SEED) for _ in range(count)]


FAMILY = BLIP3o()
