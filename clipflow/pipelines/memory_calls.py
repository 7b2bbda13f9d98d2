"""One call as far as memory goes, and what it takes in each family."""

# Shape suffixes: R = rows, L = positions.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clipflow.models.blip3o import memory
from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.blip3o.feature_decoder import FeatureDecoder
from clipflow.models.blip3o.sdxl_decoder import SDXLDecoder
from clipflow.models.blip3o.sdxl_folder import SDXLFolder
from clipflow.models.blip3o_next.config import BLIP3oNextConfig
from clipflow.models.dits.linears import can_quantize
from clipflow.models.dits.lumina import LuminaTransformer
from clipflow.models.dits.sana import SanaTransformer
from clipflow.models.unilip.config import UniLIPConfig
from clipflow.pipelines.activations import (
    decode_activations,
    decoder_kernels,
    language_activations,
    vision_activations,
)
from clipflow.pipelines.memory_estimate import MemoryEstimate, weight_bytes
from clipflow.pipelines.options import PictureSize
from clipflow.pipelines.sampler import LENGTH_STEP
from clipflow.sampling import PlanSpec, StepCache
from clipflow.sampling.loop import SamplingLoop

if TYPE_CHECKING:
    from clipflow.pipelines.families.base import Family

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class CallShape:
    """One call, as far as memory goes.

    Attributes:
        images: pictures of the call.
        prompts: different prompts among them.
        size: of each picture.
        steps, solver, guided: of sampling.
        prompt_tokens: of the longest prompt with its template, without a picture.
        edit: whether each prompt has a picture.
        step_cache: how steps are skipped, if they are.
        dtype, device, tier: of the pipeline.
    """

    images: int
    prompts: int
    size: PictureSize
    steps: int
    solver: str
    guided: bool
    prompt_tokens: int
    edit: bool
    step_cache: StepCache | None
    dtype: torch.dtype
    device: torch.device
    tier: str

    def spec(self, family: Family, config: Any, nulls: int, tokens: int) -> PlanSpec:
        """Of the plan that the call runs; on the meta device, where nothing takes memory.

        Args:
            family, config: of the model.
            nulls: different null conditions.
            tokens: of the longest condition.
        """
        schedule = family.schedule(config, self.steps)
        return PlanSpec(
            sigmas=tuple(schedule.sigmas.tolist()),
            timesteps=tuple(schedule.timesteps.tolist()),
            solver=self.solver,
            samples=self.images,
            guided=self.guided,
            latent_shape=(config.latent_channels, *self.size[:2]),
            conditions=(nulls, self.prompts),
            condition_length=-(-tokens // LENGTH_STEP) * LENGTH_STEP,
            dtype=self.dtype,
            device=torch.device("meta"),
            tier=self.tier,
            step_cache=self.step_cache,
        )


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What sampling takes.

    Attributes:
        quantized: 8-bit copies of the DiT's weights.
        plan: buffers and constants.
        step: activations of a step that are not the plan's.
    """

    quantized: int
    plan: int
    step: int


def unilip_estimate(
    family: Family, config: UniLIPConfig, counts: Mapping[str, int], call: CallShape
) -> MemoryEstimate:
    """Memory of `call` for a UniLIP of `config` with `counts` parameters in each part."""
    # The null prompts of edits show the pictures.
    nulls = (call.prompts if call.edit else 1) if call.guided else 0
    positions = call.prompt_tokens + config.n_query + (config.latent_side**2 if call.edit else 0)
    drawing = _drawing(
        _without_memory(SanaTransformer, config.dit),
        call,
        call.spec(family, config, nulls, positions),
    )
    rows = call.prompts + nulls
    language = language_activations(config.text, rows, positions, call.dtype)
    if call.edit:
        language = max(language, vision_activations(config.vision, call.prompts, call.dtype))
    shape = (call.images, *call.size[:2])
    return MemoryEstimate(
        weights=weight_bytes(family, counts, call.dtype),
        quantized_weights=drawing.quantized,
        decoder_kernels=decoder_kernels(config.decoder, shape) if call.device == CPU else 0,
        conditions=rows * positions * config.dit.caption_channels * call.dtype.itemsize,
        plan=drawing.plan,
        language=language,
        sampling=drawing.step,
        decode=decode_activations(config.decoder, shape, call.device),
    )


def next_estimate(
    family: Family, config: BLIP3oNextConfig, counts: Mapping[str, int], call: CallShape
) -> MemoryEstimate:
    """Memory of `call` for a BLIP3o-NEXT; keys and values of the image tokens are counted."""
    text, tokens = config.text, config.tokens_per_image + 1
    nulls = 1 if call.guided else 0
    drawing = _drawing(
        _without_memory(SanaTransformer, config.dit), call, call.spec(family, config, nulls, tokens)
    )
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    positions = call.images * (call.prompt_tokens + tokens)
    reading = language_activations(text, call.images, call.prompt_tokens, call.dtype)
    shape = (call.images, *call.size[:2])
    return MemoryEstimate(
        weights=weight_bytes(family, counts, call.dtype),
        quantized_weights=drawing.quantized,
        decoder_kernels=decoder_kernels(config.decoder, shape) if call.device == CPU else 0,
        conditions=call.images * tokens * config.dit.caption_channels * call.dtype.itemsize,
        plan=drawing.plan,
        language=reading + positions * (kept + text.hidden_size) * call.dtype.itemsize,
        sampling=drawing.step,
        decode=decode_activations(config.decoder, shape, call.device),
    )


def blip3o_estimate(
    family: Family,
    config: BLIP3oConfig,
    counts: Mapping[str, int],
    call: CallShape,
    decoder: SDXLDecoder | SDXLFolder | FeatureDecoder | None,
) -> MemoryEstimate:
    """Memory of `call` for a BLIP3-o; the decoder's is that of its default options."""
    nulls = 1 if call.guided else 0
    side = config.image_size // config.vision.feature_pixels
    positions = call.prompt_tokens + config.n_query + (side**2 if call.edit else 0)
    spec = call.spec(family, config, nulls, config.n_query)
    drawing = _drawing(_without_memory(LuminaTransformer, config.dit), call, spec)
    condition = config.n_query * config.text.hidden_size * call.dtype.itemsize
    language = language_activations(config.text, call.prompts, positions, call.dtype)
    if call.edit:
        seeing = memory.vision_activations(config.vision, call.prompts, call.dtype)
        language = max(language, seeing)
    return MemoryEstimate(
        weights=weight_bytes(family, counts, call.dtype),
        quantized_weights=drawing.quantized,
        decoder_kernels=0,
        conditions=(call.prompts + nulls) * condition,
        plan=drawing.plan,
        language=language,
        sampling=drawing.step,
        decode=_feature_decoding(call, decoder),
    )


def _feature_decoding(
    call: CallShape, decoder: SDXLDecoder | SDXLFolder | FeatureDecoder | None
) -> int:
    """Of a decoder of features with pictures, which are held four times in float32."""
    if decoder is None:
        return 0
    if isinstance(decoder, FeatureDecoder):
        return decode_activations(decoder.config, (call.images, *call.size[:2]), call.device)
    upscale = 2 ** (len(decoder.vae.config.block_out_channels) - 1)
    height, width = call.size.pixels or (decoder.unet.config.sample_size * upscale,) * 2
    size = (height // upscale, width // upscale)
    drawing = max(
        memory.unet_activations(decoder.unet.config, 2 * call.images, size, call.dtype),
        memory.vae_activations(decoder.vae.config, call.images, size, call.dtype),
    )
    return max(drawing, 4 * call.images * 3 * height * width * torch.float32.itemsize)


def _drawing(dit: nn.Module, call: CallShape, spec: PlanSpec) -> Drawing:
    quantized = call.tier == "fast" and _multiplies_in_8_bits(call.device)
    return Drawing(
        quantized=dit.quantized_bytes(call.device) if quantized else 0,
        plan=dit.plan_bytes(spec) + _loop_bytes(spec),
        step=2 * spec.rows * spec.tokens * dit.config.hidden_size * call.dtype.itemsize,
    )


@lru_cache(maxsize=1)
def _without_memory(cls: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls(config)


def _loop_bytes(spec: PlanSpec) -> int:
    loop = SamplingLoop(
        spec.table,
        (spec.samples, *spec.latent_shape),
        guided=spec.guided_evaluations,
        latents_dtype=torch.float32,
        model_dtype=spec.dtype,
        device=spec.device,
    )
    return loop.nbytes


def _multiplies_in_8_bits(device: torch.device) -> bool:
    """As `can_quantize`; where no GPU can be asked, it is taken for a recent one."""
    return (device.type == "cuda" and not torch.cuda.is_available()) or can_quantize(device)
