"""BLIP3o-NEXT: Qwen3 draws image tokens, whose states condition SANA-1.5; DC-AE draws pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from clipflow.models.blip3o_next.config import BLIP3oNextConfig
from clipflow.models.blip3o_next.keys import skipped_names
from clipflow.models.blip3o_next.loading import FORMAT, materialize_rotary
from clipflow.models.blip3o_next.model import NO_UNDERSTANDING, BLIP3oNextModel
from clipflow.models.blip3o_next.sizes import PARTS
from clipflow.pipelines.blip3o_next_prompts import BLIP3oNextPrompts
from clipflow.pipelines.decoding import ImageTokenSampling
from clipflow.pipelines.families.base import Conditions, Family
from clipflow.pipelines.image_io import ImageInput
from clipflow.pipelines.memory_calls import CallShape, next_estimate
from clipflow.pipelines.memory_estimate import MemoryEstimate
from clipflow.pipelines.offload import DECODER, LANGUAGE
from clipflow.pipelines.options import Generators, PictureSize, SamplingOptions
from clipflow.pipelines.output import Pictures
from clipflow.pipelines.tokenizer_files import check_tokenizer
from clipflow.sampling import FlowSchedule, euler_schedule

if TYPE_CHECKING:
    from clipflow.pipelines.parts import PipelineParts

NO_EDITS = (
    "this BLIP3o-NEXT has no way for a picture into the model; its authors' editing model is "
    "another one"
)
NO_RECONSTRUCTION = "BLIP3o-NEXT draws from image tokens, which it makes of texts alone"


class BLIP3oNext(Family):
    """The family of `clipflow.models.blip3o_next`."""

    name = "BLIP3o-NEXT"
    folder_format = FORMAT
    parts = PARTS
    wide = ("decoder",)
    wide_modules = ("vae",)
    shown_parts: ClassVar = {
        "language model": ("language model", "lm_head"),
        "connector": ("connector",),
        "DiT": ("DiT",),
        "decoder": ("decoder",),
    }
    language = ("language_model", "lm_head", "diffusion_connector")
    decoder = ("vae",)
    condition_parts = ("language_model", "diffusion_connector")
    feature_parts = ()
    own_options = ("image_tokens",)
    default_solver = "euler"

    @property
    def model_class(self) -> type[BLIP3oNextModel]:
        return BLIP3oNextModel

    def skipped_names(self, names: Iterable[str]) -> dict[str, int]:
        return skipped_names(names)

    def cannot(self, call: str, model: nn.Module) -> str | None:
        reasons = {"edit": NO_EDITS, "reconstruct": NO_RECONSTRUCTION}
        understanding = dict.fromkeys(("ask", "chat", "classify"), NO_UNDERSTANDING)
        return (reasons | understanding).get(call)

    def check_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, config: BLIP3oNextConfig, folder: Path
    ) -> None:
        tokens = config.tokens
        last = tokens.image_count - 1
        wanted = {
            "<im_start>": tokens.image_start,
            "<S0>": tokens.scale,
            "<I0>": tokens.first_image,
            f"<I{last}>": tokens.first_image + last,
        }
        check_tokenizer(tokenizer, wanted, {}, config.text.vocab_size, folder)

    def prompts(
        self, tokenizer: PreTrainedTokenizerBase, config: BLIP3oNextConfig
    ) -> BLIP3oNextPrompts:
        return BLIP3oNextPrompts(tokenizer, config)

    def reader(self, pipeline: PipelineParts) -> None:
        """It reads no conversations."""

    def image_processor(self, folder: Path | None, config: BLIP3oNextConfig) -> None:
        """It sees no pictures."""

    def finish(self, model: nn.Module, device: torch.device) -> None:
        materialize_rotary(model, device)

    def schedule(self, config: BLIP3oNextConfig, steps: int) -> FlowSchedule:
        return euler_schedule(steps, shift=config.flow_shift, truncate=False)

    def estimate(
        self, config: BLIP3oNextConfig, counts: Mapping[str, int], call: CallShape, decoder: object
    ) -> MemoryEstimate:
        return next_estimate(self, config, counts, call)

    def encode(
        self,
        pipeline: PipelineParts,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        pixels: Tensor | None,
        options: SamplingOptions,
    ) -> Conditions:
        """Each picture has image tokens of its own: they are as random as the noise."""
        each = options.images // len(prompts)
        texts = [text for text in prompts for _ in range(each)]
        cond = self._drawn(pipeline, texts, options)
        if not options.guided:
            return Conditions(cond, [])
        constant = pipeline.conditions.constant("null", pipeline.model.null_condition)
        null = [constant] * options.images
        steered = [text for text in negatives for _ in range(each)]
        places = [place for place, text in enumerate(steered) if text is not None]
        if places:
            found = self._drawn(pipeline, [steered[place] for place in places], options, places)
            for place, condition in zip(places, found, strict=True):
                null[place] = condition
        return Conditions(cond, null)

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
            return model.decode(latents.float() / model.config.scaling_factor)

    def reconstruct(
        self,
        pipeline: PipelineParts,
        images: Sequence[ImageInput],
        resolution: int | None,
        output_type: str,
    ) -> Pictures:
        raise NotImplementedError(NO_RECONSTRUCTION)  # refused before, by `require`

    def describe(self, config: BLIP3oNextConfig) -> dict[str, str]:
        text, dit, decoder = config.text, config.dit, config.decoder
        side = config.latent_side
        return {
            "language model": f"Qwen3, {text.num_hidden_layers} layers, {text.hidden_size} wide, "
            f"{text.num_attention_heads}/{text.num_key_value_heads} heads, {text.vocab_size} words",
            "image tokens": f"{config.tokens_per_image} of {config.tokens.image_count}",
            "DiT": f"SANA-1.5, {dit.num_layers} blocks, {dit.hidden_size} wide, "
            f"{side * side} tokens",
            "latents": f"{decoder.latent_channels} x {side} x {side}, factor "
            f"{config.scaling_factor}",
            "decoder": f"DC-AE, {side * decoder.upscale} px",
            "guidance": f"{config.default_guidance_scale} by default, flow shift "
            f"{config.flow_shift}",
        }

    def _drawn(
        self,
        pipeline: PipelineParts,
        texts: Sequence[str],
        options: SamplingOptions,
        samples: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Conditions [L, C] of `texts`, one for each of the pictures `samples`, or for all."""
        samples = range(len(texts)) if samples is None else samples
        alone = options.batch_invariant
        batches = [[k] for k in range(len(texts))] if alone else [list(range(len(texts)))]
        count = pipeline.model.config.tokens_per_image
        found: list[Tensor] = []
        with (
            pipeline.offload.running(LANGUAGE),
            tqdm(total=len(batches) * count, desc="image tokens", **pipeline.progress) as bar,
        ):
            for batch in batches:
                written = [pipeline.prompts.text_to_image(texts[k]) for k in batch]
                ids, mask = pipeline.prompts.rows(written, pipeline.device)
                condition = pipeline.model.encode_condition(
                    ids,
                    mask,
                    generators=options.dice([samples[k] for k in batch]),
                    progress=bar.update,
                    **asdict(options.image_tokens or ImageTokenSampling()),
                )
                rows = zip(condition.hidden, condition.mask, strict=True)
                found += [hidden[real] for hidden, real in rows]
        return found


FAMILY = BLIP3oNext()
