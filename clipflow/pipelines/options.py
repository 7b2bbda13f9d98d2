"""The options of a sampling call, checked once for all entry points."""

# Shape suffixes: C = latent channels, h, w = the latent grid.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipflow.errors import InputError
from clipflow.models.language.token_sampling import Generators
from clipflow.pipelines.arguments import is_list
from clipflow.pipelines.decoding import FeatureDecoding, ImageTokenSampling
from clipflow.pipelines.output import OUTPUT_RESOLUTIONS, OUTPUT_TYPES
from clipflow.sampling import SOLVERS, TIERS, StepCache
from clipflow.sampling.step_cache import check_step_cache

# callback(pipeline, step, timestep, {"latents": ...}) -> the same, maybe changed.
StepEndCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

MAX_STEPS = 1000


class PictureSize(NamedTuple):
    """The latent grid of a picture; a native picture is resized to the model's output size.

    `pixels` is (height, width), where the grid does not say it.
    """

    h: int
    w: int
    native: bool
    pixels: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """One sampling call, checked.

    Attributes:
        num_inference_steps: of the solver.
        guidance_scales: of each picture; 1 runs no null rows.
        sizes: of each picture's latents.
        guidance_interval: (start, end) as fractions of the steps; outside there is no guidance.
        solver: a key of `clipflow.sampling.SOLVERS`.
        generator: one for all pictures, or one for each.
        latents: noise to start from, or None.
        output_type: one of `OUTPUT_TYPES`.
        output_resolution: one of `OUTPUT_RESOLUTIONS`.
        callback: the user's own, or None.
        batch_invariant: sample each picture by itself.
        tier: one of `clipflow.sampling.TIERS`.
        step_cache: how steps are skipped, or None.
        decoding, image_tokens: of the families that have them, or None for the defaults.
    """

    num_inference_steps: int
    guidance_scales: tuple[float, ...]
    sizes: tuple[PictureSize, ...]
    guidance_interval: tuple[float, float]
    solver: str
    generator: Generators
    latents: Tensor | None
    output_type: str
    output_resolution: str
    callback: StepEndCallback | None
    batch_invariant: bool
    tier: str
    step_cache: StepCache | None
    decoding: FeatureDecoding | None
    image_tokens: ImageTokenSampling | None

    def __post_init__(self) -> None:
        check_steps(self.num_inference_steps)
        for scale in self.guidance_scales:
            check_guidance(scale)
        check_solver(self.solver)
        check_output_type(self.output_type)
        check_output_resolution(self.output_resolution)
        check_tier(self.tier)
        check_step_cache(self.step_cache, self.solver)
        _check_interval(self.guidance_interval)
        generators = self.generator
        if isinstance(generators, Sequence) and len(generators) != self.images:
            raise InputError(
                f"generator must be one, or a list of {self.images} (one for each image), "
                f"got a list of {len(generators)}"
            )

    @property
    def images(self) -> int:
        """How many pictures the call makes."""
        return len(self.sizes)

    @property
    def guided(self) -> bool:
        """Whether any picture has null rows."""
        return any(scale != 1.0 for scale in self.guidance_scales)

    def dice(self, samples: Sequence[int]) -> Generators:
        """The generators of some of the pictures; the one of all where they share it."""
        if isinstance(self.generator, Sequence):
            return [self.generator[sample] for sample in samples]
        return self.generator

    def noise(self, channels: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Starting latents of each picture, [C, h, w] float32: those given, or drawn.

        Noise is drawn in `dtype`, which belongs to the model, on the generator's own device, so
        that a seed means the same picture whatever the model computes in, and where.
        """
        draw = partial(_draw, dtype=dtype, device=device)
        same = len(set(self.sizes)) == 1
        if self.latents is not None:
            wanted = [self.images, channels, *self.sizes[0][:2]]
            if not same or list(self.latents.shape) != wanted:
                sizes = "pictures of one size" if not same else str(wanted)
                raise InputError(f"latents must be {sizes}, got {list(self.latents.shape)}")
            return list(self.latents.to(device, torch.float32))
        if isinstance(self.generator, Sequence):
            dice = self.generator
        elif same:
            return list(draw((self.images, channels, *self.sizes[0][:2]), self.generator))
        else:
            dice = [self.generator] * self.images
        shapes = [(channels, size.h, size.w) for size in self.sizes]
        return [draw(shape, one) for shape, one in zip(shapes, dice, strict=True)]


def each_image(name: str, value: object, prompts: int, images_per_prompt: int) -> tuple[Any, ...]:
    """One value for every picture, of one for all, one for each prompt, or one for each picture.

    Raises:
        InputError: a list of another length.
    """
    images = prompts * images_per_prompt
    if not is_list(value):
        return (value,) * images
    if len(value) == images:
        return tuple(value)
    if len(value) == prompts:
        return tuple(one for one in value for _ in range(images_per_prompt))
    raise InputError(
        f"{name} must be one, or a list of {prompts} (one for each prompt) or {images} (one for "
        f"each image), got a list of {len(value)}"
    )


def check_steps(steps: int) -> None:
    """Raise InputError unless `steps` is a number of solver steps."""
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        raise InputError(
            f"num_inference_steps must be a whole number from 1 to {MAX_STEPS}, got {steps!r}"
        )


def check_guidance(scale: float) -> None:
    """Raise InputError unless `scale` is a guidance scale."""
    number = isinstance(scale, (int, float)) and math.isfinite(scale)
    if not number or scale < 0:
        raise InputError(f"guidance_scale must be a number of at least 0, got {scale!r}")


def check_solver(solver: str) -> None:
    """Raise InputError unless `solver` is known."""
    if solver not in SOLVERS:
        raise InputError(f"solver must be one of {', '.join(sorted(SOLVERS))}, got {solver!r}")


def check_tier(tier: str) -> None:
    """Raise InputError unless `tier` is known."""
    if tier not in TIERS:
        raise InputError(f"tier must be one of {', '.join(TIERS)}, got {tier!r}")


def check_output_type(output_type: str) -> None:
    """Raise InputError unless pictures can be handed out as `output_type`."""
    if output_type not in OUTPUT_TYPES:
        raise InputError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}"
        )


def check_output_resolution(output_resolution: str) -> None:
    """Raise InputError unless it is known how large to hand out pictures."""
    if output_resolution not in OUTPUT_RESOLUTIONS:
        raise InputError(
            f"output_resolution must be one of {', '.join(OUTPUT_RESOLUTIONS)}, "
            f"got {output_resolution!r}"
        )


def _check_interval(interval: object) -> None:
    pair = is_list(interval) and len(interval) == 2
    if not pair or not all(isinstance(end, (int, float)) for end in interval):
        raise InputError(f"guidance_interval must be (start, end), got {interval!r}")
    start, end = interval
    if not 0 <= start < end <= 1:
        raise InputError(f"guidance_interval must be 0 <= start < end <= 1, got ({start}, {end})")


def _draw(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    source = generator.device if generator is not None else device
    noise = torch.randn(shape, generator=generator, device=source, dtype=dtype)
    return noise.to(device, torch.float32)
