"""How much memory a call will need, from a model's configuration alone.

Weights, plans and what the decoder keeps are counted exactly; activations of the language side are
the largest set of tensors that lives at once, as its layers are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clipflow.errors import InputError
from clipflow.models.folders.parts import count_shapes
from clipflow.pipelines.arguments import positive
from clipflow.pipelines.generation_defaults import GenerationDefaults
from clipflow.pipelines.loading import summarize_folder
from clipflow.pipelines.model_folders import find_model
from clipflow.pipelines.options import (
    check_guidance,
    check_solver,
    check_steps,
    check_tier,
)
from clipflow.sampling import StepCache

if TYPE_CHECKING:
    from clipflow.pipelines.families.base import Family
    from clipflow.pipelines.memory_calls import CallShape
    from clipflow.pipelines.parts import PipelineParts

PROMPT_TOKENS = 64
# What a family shows of its weights beside those of the language side.
DIT, DECODER = "DiT", "decoder"


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a pipeline holds in one call.

    Attributes:
        weights: of the parts that the family shows; "DiT" and "decoder" are among them, all others
            read prompts.
        quantized_weights: of the DiT's 8-bit copies in the fast tier.
        decoder_kernels: what the decoder keeps of its weights in another form, on CPUs.
        conditions: of the prompts, kept for the next call.
        plan: buffers and constants of sampling, kept for the next call.
        language: activations while the language side reads the prompts.
        sampling: activations of a step that are not the plan's.
        decode: activations while pictures are drawn from latents, and the pictures.
    """

    weights: Mapping[str, int]
    quantized_weights: int
    decoder_kernels: int
    conditions: int
    plan: int
    language: int
    sampling: int
    decode: int

    @property
    def total_weights(self) -> int:
        """All weights, without the 8-bit copies."""
        return sum(self.weights.values())

    @property
    def resting_weights(self) -> int:
        """Of the parts that wait on the CPU when the model is offloaded."""
        return self.total_weights - self.weights[DIT]

    @property
    def variable(self) -> int:
        """What a call adds to the weights at most."""
        return self.kept + max(self.language, self.sampling, self.decode)

    @property
    def kept(self) -> int:
        """What a call leaves for the next one, apart from the weights."""
        return self.quantized_weights + self.decoder_kernels + self.conditions + self.plan

    @property
    def peak(self) -> int:
        """Everything that is held at once, at most."""
        return self.total_weights + self.variable

    @property
    def peak_with_offload(self) -> int:
        """The same on the device with `enable_model_cpu_offload`."""
        drawing = self.weights[DIT] + self.weights[DECODER]
        language = self.total_weights - drawing + self.language
        decode = self.weights[DECODER] + self.decode
        return self.weights[DIT] + self.kept + max(language, self.sampling, decode)

    def as_dict(self) -> dict[str, object]:
        """All numbers under their names, for JSON."""
        return {
            **vars(self),
            "weights": dict(self.weights),
            "total_weights": self.total_weights,
            "peak": self.peak,
            "peak_with_offload": self.peak_with_offload,
        }

    def __str__(self) -> str:
        rows = {
            **{f"weights: {part}": size for part, size in self.weights.items()},
            "weights in 8 bits": self.quantized_weights,
            "decoder kernels": self.decoder_kernels,
            "conditions": self.conditions,
            "plan": self.plan,
            "reading the prompts": self.language,
            "a step": self.sampling,
            "decoding": self.decode,
            "peak": self.peak,
            "peak with offload": self.peak_with_offload,
        }
        return "\n".join(f"{name:<24}{size / 2**20:>11,.1f} MiB" for name, size in rows.items())


def weight_bytes(family: Family, counts: Mapping[str, int], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of what `family` shows of a model with `counts` parameters in each part."""
    return {
        shown: sum(
            counts[part] * (torch.float32 if part in family.wide else dtype).itemsize
            for part in parts
        )
        for shown, parts in family.shown_parts.items()
    }


def folder_estimate(
    name: str | Path,
    *,
    num_images: int = 1,
    num_prompts: int = 1,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    solver: str | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    edit: bool = False,
    step_cache: StepCache | None = None,
    dtype: torch.dtype = torch.float32,
    tier: str = "faithful",
    device: str | torch.device = "cpu",
) -> MemoryEstimate:
    """Estimate the memory of a call before a model is loaded.

    Args:
        name: "scenes" (embedded), a folder, or a hub name in the local cache; config.json and the
            headers of its weights are read.
        num_images: pictures that the call makes.
        num_prompts: different prompts among them.
        height, width: in pixels, of all pictures; the model's native size when not given.
        num_inference_steps, guidance_scale, solver: the model's own when not given.
        prompt_tokens: of the longest prompt, its template included (about 15 tokens).
        edit: the call is `edit`, with a picture for each prompt.
        step_cache: how steps are skipped, if they are.
        dtype: of the weights; DC-AE decoders are float32 always.
        tier: of sampling.
        device: where the model will run.

    Raises:
        InputError: there is no such model, its folder is broken, or an option cannot be.
    """
    folder = find_model(name)
    summary = summarize_folder(folder)
    family, config = summary.family, summary.config
    defaults = family.generation_defaults(folder, config)
    return family.estimate(config, summary.counts, _call(
        family, config, defaults, images=num_images, prompts=num_prompts, height=height,
        width=width,
        steps=num_inference_steps, scale=guidance_scale, solver=solver, edit=edit,
        step_cache=step_cache,
        prompt_tokens=prompt_tokens, dtype=dtype, tier=tier, device=torch.device(device),
    ), family.decoder_in(folder))  # fmt: skip


def pipeline_estimate(
    pipeline: PipelineParts,
    *,
    num_images: int = 1,
    num_prompts: int = 1,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    solver: str | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    edit: bool = False,
    step_cache: StepCache | None = None,
    tier: str | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a call of a pipeline, with its dtype, device and defaults.

    The arguments are those of `folder_estimate`; `tier` is the pipeline's own when not given.

    Raises:
        InputError: an option cannot be.
    """
    family, config = pipeline.family, pipeline.model.config
    shapes = {name: p.shape for name, p in pipeline.model.named_parameters()}
    return family.estimate(config, count_shapes(shapes, family.parts), _call(
        family, config, pipeline.defaults, images=num_images, prompts=num_prompts, height=height,
        width=width, steps=num_inference_steps, scale=guidance_scale, solver=solver, edit=edit,
        step_cache=step_cache,
        prompt_tokens=prompt_tokens, dtype=pipeline.dtype, tier=tier or pipeline.tier,
        device=pipeline.device,
    ), getattr(pipeline.model, "decoder", None))  # fmt: skip


class MemoryEstimator:
    """The method `memory_estimate`: of the class `folder_estimate`, of a pipeline its own."""

    def __get__(
        self, pipeline: PipelineParts | None, owner: type[PipelineParts]
    ) -> Callable[..., MemoryEstimate]:
        return folder_estimate if pipeline is None else partial(pipeline_estimate, pipeline)


def _call(
    family: Family,
    config: Any,
    defaults: GenerationDefaults,
    *,
    images: int,
    prompts: int,
    height: int | None,
    width: int | None,
    steps: int | None,
    scale: float | None,
    solver: str | None,
    **others: object,
) -> CallShape:
    steps = defaults.num_inference_steps if steps is None else steps
    scale = defaults.guidance_scale if scale is None else scale
    solver = defaults.solver if solver is None else solver
    check_steps(steps)
    check_guidance(scale)
    check_solver(solver)
    check_tier(others["tier"])
    positive("prompt_tokens", others["prompt_tokens"])
    if positive("num_images", images) % positive("num_prompts", prompts):
        raise InputError(f"num_images must be a multiple of num_prompts {prompts}, got {images}")
    from clipflow.pipelines.memory_calls import CallShape

    return CallShape(
        images=images,
        prompts=prompts,
        size=family.picture_size(height, width, config),
        steps=steps,
        solver=solver,
        guided=scale != 1.0,
        **others,
    )
