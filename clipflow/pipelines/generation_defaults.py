"""What a call does when it does not say: a model's generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipflow.errors import InputError
from clipflow.models.unilip.config import UniLIPConfig
from clipflow.pipelines.arguments import positive
from clipflow.pipelines.options import check_guidance, check_solver, check_steps

FILE_NAME = "generation_config.json"
DEFAULT_STEPS = 20
DEFAULT_SOLVER = "dpmpp_2m"


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
        positive("max_new_tokens", defaults.max_new_tokens)
        check_steps(defaults.num_inference_steps)
        check_guidance(defaults.guidance_scale)
        check_solver(defaults.solver)
        return defaults

    def to_json(self) -> str:
        values = {
            "default_guidance_scale": self.guidance_scale,
            "default_num_inference_steps": self.num_inference_steps,
            "default_solver": self.solver,
            "max_new_tokens": self.max_new_tokens,
        }
        return json.dumps(values, indent=2) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values
