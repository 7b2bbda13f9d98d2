"""A recipe: everything that decides a training run, read from a YAML file with strict keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

_RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PACKAGED = (_RECIPES / "scenes", _RECIPES / "scenes_blip3o")
STAGES = ("understanding", "reconstruction", "generation", "target", "seeing")
OPTIMIZERS = ("adamw", "muon")
_MINUTES = re.compile(r"([0-9.]+) *(?:m|min|minutes?)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    Attributes:
        name: names the folder of the run, and what `init` of a later recipe refers to.
        stage: module in `clipflow.training.stages` with the data and the loss.
        steps: optimizer steps; the run ends after them, or after `minutes`.
        minutes: wall-clock cap over all pieces of the run, set-up not counted; None for none. A
            run with a cap resumes exactly in its state, but its learning rate follows the clock.
        batch_size: what one optimizer step sees; the stage builds the batch.
        lr: peak learning rate. It falls on a cosine to `min_lr_ratio` times itself.
        warmup_steps: steps of linear rise at the start.
        weight_decay: decoupled; parameters of at least two dimensions only.
        betas: of AdamW.
        clip: largest gradient norm; 0 for no clipping.
        ema: decay of the weight average that the run results in; 0 for the last weights.
        optimizer: "adamw", or "muon" (Muon for hidden matrices, AdamW for the rest).
        checkpoint_every: steps (an integer) or minutes (a string, "5 minutes").
        log_every: steps between two lines of `log.jsonl`.
        lr_scale: parameter-name prefix -> factor on the learning rate; the longest match counts.
        trainable: parameter-name prefixes to train; everything else is frozen. Empty: train all.
        init: name of the recipe whose result starts this run, or a model folder; None: untrained.
        options: the stage's own, and `threads` (torch CPU threads), `device`, `prefetch` (build
            the next batch in a thread; default: on a GPU).
        compile: the stage may wrap what it likes in torch.compile.
    """

    name: str
    stage: str
    steps: int
    batch_size: int
    lr: float
    seed: int = 0
    minutes: float | None = None
    min_lr_ratio: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    ema: float = 0.999
    optimizer: str = "adamw"
    checkpoint_every: int | str = "5 minutes"
    log_every: int = 50
    lr_scale: dict[str, float] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    init: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    compile: bool = False

    def __post_init__(self) -> None:
        for name, (is_valid, wanted) in _RULES.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"recipe: {name} must be {wanted}, got {value!r}")

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps between two checkpoints, or None when the clock decides."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else None

    @property
    def checkpoint_minutes(self) -> float | None:
        """Minutes between two checkpoints, or None when steps decide."""
        if isinstance(self.checkpoint_every, int):
            return None
        return float(_MINUTES.fullmatch(self.checkpoint_every).group(1))

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe from a YAML file.

        Raises:
            ValueError: not YAML, an unknown or missing key, or a value out of its range.
            OSError: the file cannot be read.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"recipe {path}: must be YAML, got: {error}") from error
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            raise ValueError(f"recipe {path}: must be a mapping, got {kind}")
        try:
            return cls.from_mapping(values)
        except ValueError as error:
            raise ValueError(f"{error} (in {path})") from error

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """Make a recipe of plain values, as YAML or JSON gives them."""
        known = {f.name: f for f in fields(cls)}
        unknown = [str(key) for key in values if key not in known]
        if unknown:
            raise ValueError(
                f"recipe: unknown key {', '.join(map(repr, unknown))}; known: {', '.join(known)}"
            )
        required = [
            name
            for name, f in known.items()
            if f.default is MISSING and f.default_factory is MISSING
        ]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"recipe: missing key {', '.join(map(repr, missing))}")
        return cls(**{key: _plain(key, value) for key, value in values.items()})


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: a path as it is, a bare name among the packaged recipes.

    Raises:
        FileNotFoundError: there is no such file, or no packaged recipe of that name.
    """
    text = str(recipe)
    if isinstance(recipe, Path) or text.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise FileNotFoundError(f"recipe: no file {path}")
        return path
    packaged = {path.stem: path for folder in PACKAGED for path in sorted(folder.glob("*.yaml"))}
    if text not in packaged:
        names = ", ".join(packaged) or "none"
        raise FileNotFoundError(f"recipe: must be one of {names}, or a .yaml file, got {text!r}")
    return packaged[text]


def _plain(key: str, value: Any) -> Any:
    """Undo what YAML does to a value: `1e-3` is a string to it, a tuple is a list."""
    if key in _FLOATS and isinstance(value, (str, int)) and not isinstance(value, bool):
        return _as_float(value)
    if key == "betas" and isinstance(value, list):
        return tuple(_as_float(beta) for beta in value)
    if key == "trainable" and isinstance(value, list):
        return tuple(value)
    if key == "lr_scale" and isinstance(value, Mapping):
        return {prefix: _as_float(factor) for prefix, factor in value.items()}
    return value


def _as_float(value: Any) -> Any:
    """`value` as a float where it is one; else as it is, for the rules to name."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_between(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_positive(value: Any) -> bool:
    return _is_between(value, 0, float("inf")) and value > 0


def _is_interval(value: Any) -> bool:
    if not isinstance(value, str):
        return _is_int(value, 1)
    match = _MINUTES.fullmatch(value)
    return match is not None and _is_positive(_as_float(match.group(1)))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) is not None


_FLOATS = ("lr", "minutes", "min_lr_ratio", "weight_decay", "clip", "ema")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_name, "letters, digits, '.', '_' and '-'"),
    "stage": (lambda v: isinstance(v, str) and v.isidentifier(), f"one of {', '.join(STAGES)}"),
    "steps": (lambda v: _is_int(v, 1), "a positive integer"),
    "batch_size": (lambda v: _is_int(v, 1), "a positive integer"),
    "lr": (_is_positive, "a positive number"),
    "seed": (lambda v: _is_int(v, 0), "an integer of at least 0"),
    "minutes": (lambda v: v is None or _is_positive(v), "a positive number or null"),
    "min_lr_ratio": (lambda v: _is_between(v, 0, 1), "between 0 and 1"),
    "warmup_steps": (lambda v: _is_int(v, 0), "an integer of at least 0"),
    "weight_decay": (lambda v: _is_between(v, 0, float("inf")), "at least 0"),
    "betas": (
        lambda v: (
            isinstance(v, tuple) and len(v) == 2 and all(_is_between(b, 0, 0.999999) for b in v)
        ),
        "two numbers in [0, 1)",
    ),
    "clip": (lambda v: _is_between(v, 0, float("inf")), "at least 0"),
    "ema": (lambda v: _is_between(v, 0, 0.9999999), "in [0, 1)"),
    "optimizer": (lambda v: v in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
    "checkpoint_every": (_is_interval, "a number of steps, or minutes as in '5 minutes'"),
    "log_every": (lambda v: _is_int(v, 1), "a positive integer"),
    "lr_scale": (
        lambda v: isinstance(v, dict) and all(_is_positive(factor) for factor in v.values()),
        "a mapping of parameter-name prefixes to positive factors",
    ),
    "trainable": (
        lambda v: isinstance(v, tuple) and all(isinstance(prefix, str) for prefix in v),
        "a list of parameter-name prefixes",
    ),
    "init": (lambda v: v is None or (isinstance(v, str) and v != ""), "a name, a folder or null"),
    "options": (lambda v: isinstance(v, dict), "a mapping"),
    "compile": (lambda v: isinstance(v, bool), "true or false"),
}
