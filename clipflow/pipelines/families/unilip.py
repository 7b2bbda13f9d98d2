"""UniLIP: InternVL3, queries and a connector, SANA over compressed CLIP features, DC-AE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from clipflow.models.unilip import UniLIPConfig, UniLIPModel
from clipflow.models.unilip.keys import skipped_names
from clipflow.models.unilip.loading import FORMAT, materialize_rotary
from clipflow.models.unilip.sizes import PARTS
from clipflow.pipelines.families.base import Family
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.memory_calls import CallShape, unilip_estimate
from clipflow.pipelines.memory_estimate import MemoryEstimate
from clipflow.pipelines.offload import DECODER, LANGUAGE
from clipflow.pipelines.options import Generators, PictureSize, SamplingOptions
from clipflow.pipelines.output import Pictures
from clipflow.pipelines.readers import TileReader
from clipflow.pipelines.reconstruction import Canvas
from clipflow.pipelines.tokenizer_files import check_tokenizer
from clipflow.pipelines.unilip_prompts import UniLIPPrompts

if TYPE_CHECKING:
    from clipflow.pipelines.parts import PipelineParts


class UniLIP(Family):
    """The family of `clipflow.models.unilip`."""

    name = "UniLIP"
    folder_format = FORMAT
    parts = PARTS
    wide = ("clip_down", "decoder")
    wide_modules = ("vae_decoder",)
    shown_parts: ClassVar = {
        "vision tower": ("vision tower",),
        "language model": ("language model", "lm_head"),
        "connector": ("projector", "queries", "connector"),
        "DiT": ("DiT",),
        "decoder": ("clip_down", "decoder"),
    }
    language = (
        "vision_tower",
        "multi_modal_projector",
        "language_model",
        "lm_head",
        "llm_connector",
        "projector",
    )
    decoder = ("vae_decoder",)
    condition_parts = (
        "vision_tower",
        "multi_modal_projector",
        "language_model",
        "latent_queries",
        "llm_connector",
        "projector",
    )
    feature_parts = ("vision_tower", "multi_modal_projector")

    @property
    def model_class(self) -> type[UniLIPModel]:
        return UniLIPModel

    def skipped_names(self, names: Iterable[str]) -> dict[str, int]:
        return skipped_names(names)

    def check_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, config: UniLIPConfig, folder: Path
    ) -> None:
        tokens = config.tokens
        wanted = {"<img>": tokens.img_start, "<IMG_CONTEXT>": tokens.img_context}
        optional = {"</img>": tokens.img_end, "<|im_end|>": tokens.im_end}
        check_tokenizer(tokenizer, wanted, optional, config.text.vocab_size, folder)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, config: UniLIPConfig) -> UniLIPPrompts:
        return UniLIPPrompts(tokenizer, config)

    def reader(self, pipeline: PipelineParts) -> TileReader:
        return TileReader(pipeline)

    def finish(self, model: nn.Module, device: torch.device) -> None:
        materialize_rotary(model, device)

    def estimate(
        self, config: UniLIPConfig, counts: Mapping[str, int], call: CallShape, decoder: object
    ) -> MemoryEstimate:
        return unilip_estimate(self, config, counts, call)

    def default_steps(self, config: UniLIPConfig) -> int:
        return 20

    def draw(
        self,
        pipeline: PipelineParts,
        latents: Tensor,
        size: PictureSize,
        options: SamplingOptions,
        generator: Generators,
    ) -> Tensor:
        model = pipeline.model
        with pipeline.offload.running(DECODER):
            return model.decode(latents.float() / model.config.unilip_factor)

    def reconstruct(
        self,
        pipeline: PipelineParts,
        images: Sequence[ImageInput],
        resolution: int | None,
        output_type: str,
    ) -> Pictures:
        model = pipeline.model
        config, canvas = model.config, Canvas.of(resolution, model.config)
        if resolution is not None:
            canvas.require_memory(len(images), config, pipeline.dtype, pipeline.device)
        pixels = canvas.pixel_values(images, pipeline.image_processor)
        pixels = pixels.to(pipeline.device, pipeline.dtype)
        with pipeline.offload.running(LANGUAGE):
            features = model.encode_image(pixels).float()
        with pipeline.offload.running(DECODER):
            scaled = model.clip_down(features) * config.unilip_factor
            if output_type == "latent":
                return scaled
            return canvas.pictures(model.decode(scaled / config.unilip_factor), output_type)

    def describe(self, config: UniLIPConfig) -> dict[str, str]:
        vision, text, dit, decoder = config.vision, config.text, config.dit, config.decoder
        side = config.latent_side
        return {
            "vision tower": f"InternViT, {vision.num_hidden_layers} layers, {vision.hidden_size} "
            f"wide, {vision.image_size} px in patches of {vision.patch_size} -> {side * side} "
            "tokens",
            "language model": f"Qwen2, {text.num_hidden_layers} layers, {text.hidden_size} wide, "
            f"{text.num_attention_heads}/{text.num_key_value_heads} heads, {text.vocab_size} words",
            "queries": f"{config.n_query}",
            "connector": f"{config.connect_layer} layers, bidirectional",
            "DiT": f"SANA, {dit.num_layers} blocks, {dit.hidden_size} wide, {side * side} tokens",
            "latents": f"{decoder.latent_channels} x {side} x {side}, factor "
            f"{config.unilip_factor}",
            "decoder": f"DC-AE, {side * decoder.upscale} px, shown at {config.output_size} px",
            "guidance": f"{config.default_guidance_scale} by default, flow shift "
            f"{config.flow_shift}",
        }


FAMILY = UniLIP()
