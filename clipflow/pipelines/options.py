"""The options of a sampling call, checked once for all entry points."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipflow.errors import InputError
from clipflow.models.unilip.config import UniLIPConfig
from clipflow.pipelines.output import OUTPUT_TYPES
from clipflow.sampling import SOLVERS

Generators = torch.Generator | Sequence[torch.Generator] | None
# callback(pipeline, step, timestep, {"latents": ...}) -> the same, maybe changed.
StepEndCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

FILE_NAME = "generation_config.json"
DEFAULT_STEPS = 20
DEFAULT_SOLVER = "dpmpp_2m"
MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a call does when it does not say: a model's `generation_config.json`."""

    guidance_scale: float
    num_inference_steps: int
    solver: str
    max_new_tokens: int

    @classmethod
    def from_folder(cls, folder: Path | None, config: UniLIPConfig) -> GenerationDefaults:
        """Read the file of `folder`; keys that are not there have the library's defaults.

        Raises:
            InputError: the file is no JSON object, or a value is senseless.
        """
        values = _read_json(folder / FILE_NAME) if folder else {}
        defaults = cls(
            guidance_scale=values.get("default_guidance_scale", config.default_guidance_scale),
            num_inference_steps=values.get("default_num_inference_steps", DEFAULT_STEPS),
            solver=values.get("default_solver", DEFAULT_SOLVER),
            max_new_tokens=values.get("max_new_tokens", 64),
        )
        check_sampling(defaults.num_inference_steps, defaults.guidance_scale, defaults.solver)
        return defaults

    def options(
        self,
        images: int,
        *,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        solver: str | None,
        generator: Generators,
        latents: Tensor | None,
        output_type: str,
        callback: StepEndCallback | None,
    ) -> SamplingOptions:
        """Checked options of one call that makes `images` pictures; None takes the default."""
        steps, scale = num_inference_steps, guidance_scale
        return SamplingOptions(
            images=images,
            num_inference_steps=self.num_inference_steps if steps is None else steps,
            guidance_scale=self.guidance_scale if scale is None else scale,
            solver=self.solver if solver is None else solver,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback=callback,
        )

    def to_json(self) -> str:
        values = {
            "default_guidance_scale": self.guidance_scale,
            "default_num_inference_steps": self.num_inference_steps,
            "default_solver": self.solver,
            "max_new_tokens": self.max_new_tokens,
        }
        return json.dumps(values, indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """One sampling call, checked; `images` is how many pictures it makes."""

    images: int
    num_inference_steps: int
    guidance_scale: float
    solver: str
    generator: Generators
    latents: Tensor | None
    output_type: str
    callback: StepEndCallback | None

    def __post_init__(self) -> None:
        check_sampling(self.num_inference_steps, self.guidance_scale, self.solver)
        check_output_type(self.output_type)
        generators = self.generator
        if isinstance(generators, Sequence) and len(generators) != self.images:
            raise InputError(
                f"generator must be one, or a list of {self.images} (one for each image), "
                f"got a list of {len(generators)}"
            )

    def noise(self, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """Starting latents [images, C, h, w] in float32: those given, or drawn.

        Noise is drawn in float32 on the generator's own device, so that a seed means the same
        picture whatever the device and dtype of the model.
        """
        wanted = (self.images, *shape)
        if self.latents is not None:
            if tuple(self.latents.shape) != wanted:
                raise InputError(f"latents must be {list(wanted)}, got {list(self.latents.shape)}")
            return self.latents.to(device, torch.float32)
        if isinstance(self.generator, Sequence):
            return torch.stack([_draw(shape, one, device) for one in self.generator])
        return _draw(wanted, self.generator, device)


def check_sampling(steps: int, guidance_scale: float, solver: str) -> None:
    """Refuse senseless sampling options.

    Raises:
        InputError: with what was found and what is wanted.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        raise InputError(
            f"num_inference_steps must be a whole number from 1 to {MAX_STEPS}, got {steps!r}"
        )
    number = isinstance(guidance_scale, (int, float)) and math.isfinite(guidance_scale)
    if not number or guidance_scale < 0:
        raise InputError(f"guidance_scale must be a number of at least 0, got {guidance_scale!r}")
    if solver not in SOLVERS:
        raise InputError(f"solver must be one of {', '.join(sorted(SOLVERS))}, got {solver!r}")


def check_output_type(output_type: str) -> None:
    """Raise InputError unless pictures can be handed out as `output_type`."""
    if output_type not in OUTPUT_TYPES:
        raise InputError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}"
        )


def _draw(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source).to(device)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values
