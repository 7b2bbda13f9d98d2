"""What a call does when it does not say: a model's generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipflow.errors import InputError
from clipflow.models.language.token_sampling import TokenSampling
from clipflow.pipelines.arguments import positive
from clipflow.pipelines.options import check_guidance, check_solver, check_steps

FILE_NAME = "generation_config.json"
MAX_NEW_TOKENS, POSITIONS_PER_NEW_TOKEN = 512, 16


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a call does when it does not say: a model's `generation_config.json`."""

    guidance_scale: float
    num_inference_steps: int
    solver: str
    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()  # that end an answer, besides the model's end of turn
    repetition_penalty: float = 1.0

    @classmethod
    def from_folder(
        cls, folder: Path | None, config: Any, *, steps: int = 20, solver: str = "dpmpp_2m"
    ) -> GenerationDefaults:
        """Read the file of `folder`; `steps` and `solver` where it does not say.

        Raises:
            InputError: the file is no JSON object, or a value is senseless.
        """
        values = _read_json(folder / FILE_NAME) if folder else {}
        defaults = cls(
            guidance_scale=values.get("default_guidance_scale", config.default_guidance_scale),
            num_inference_steps=values.get("default_num_inference_steps", steps),
            solver=values.get("default_solver", solver),
            max_new_tokens=values.get("max_new_tokens", _new_tokens(config)),
            eos_token_ids=_token_ids(values.get("eos_token_id"), config),
            repetition_penalty=values.get("repetition_penalty", cls.repetition_penalty),
        )
        positive("max_new_tokens", defaults.max_new_tokens)
        check_steps(defaults.num_inference_steps)
        check_guidance(defaults.guidance_scale)
        check_solver(defaults.solver)
        TokenSampling(repetition_penalty=defaults.repetition_penalty)  # or InputError
        return defaults

    def to_json(self) -> str:
        values = {
            "default_guidance_scale": self.guidance_scale,
            "default_num_inference_steps": self.num_inference_steps,
            "default_solver": self.solver,
            "max_new_tokens": self.max_new_tokens,
        }
        if self.repetition_penalty != 1:
            values["repetition_penalty"] = self.repetition_penalty
        if self.eos_token_ids:
            values["eos_token_id"] = list(self.eos_token_ids)
        return json.dumps(values, indent=2) + "\n"


def _new_tokens(config: Any) -> int:
    """The longest answer of a model that does not say: a small part of what it can read."""
    positions = config.text.max_position_embeddings
    return min(MAX_NEW_TOKENS, max(1, positions // POSITIONS_PER_NEW_TOKEN))


def _token_ids(value: object, config: Any) -> tuple[int, ...]:
    """The ids in an "eos_token_id": a number, a list of them, or null."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    size = config.text.vocab_size
    if not all(type(token) is int and 0 <= token < size for token in ids):
        raise InputError(
            f"{FILE_NAME}: eos_token_id must be whole numbers below {size}, got {value!r}"
        )
    return tuple(ids)


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
