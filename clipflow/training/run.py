"""Run recipes: find the model each starts from, train it, keep what it results in.

out/<recipe name>/run.json      the recipe, what it started from, whether it is finished
out/<recipe name>/log.jsonl     loss, learning rate and images/s over the steps
out/<recipe name>/checkpoints/  the last two moments to resume from
out/<recipe name>/final/        the result: averaged weights, as the model saves itself
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from clipflow.training.checkpoint import sha256, writing
from clipflow.training.loop import Stage, fit
from clipflow.training.recipe import Recipe, find_recipe

SCENES = (
    "understanding",
    "relations",
    "reconstruction1",
    "reconstruction2",
    "generation",
    "meaning",
    "editing",
)
# Of the scenes BLIP3-o, which starts from the embedded UniLIP-scenes.
SCENES_BLIP3O = (
    "target",
    "seeing",
    "placing",
    "reading",
    "rewriting",
    "drawing",
    "relating",
    "finishing",
)
CHAINS = {"scenes": SCENES, "scenes-blip3o": SCENES_BLIP3O}
# What may change between two pieces of a run: how long and where it runs, not what it learns.
_MAY_CHANGE = ("steps", "minutes", "checkpoint_every", "log_every", "compile")
_OPTIONS_MAY_CHANGE = ("threads", "device", "prefetch")
_log = logging.getLogger(__name__)


def train(
    recipe: str | Path,
    out: Path,
    *,
    model: nn.Module | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    progress: bool = True,
) -> Path:
    """Train one recipe, or continue it; a finished one returns at once.

    Args:
        recipe: name of a packaged recipe, or a YAML file.
        out: folder of all runs; this one has `out/<recipe name>`.
        model: starts the run in place of the recipe's `init`. Trained in place.
        minutes: in place of the recipe's wall-clock cap.
        steps: in place of the recipe's steps.
        progress: show a bar on stderr.

    Returns:
        The folder with the resulting model, `out/<recipe name>/final`.

    Raises:
        ValueError: a bad recipe, or `out` holds a run of a different one.
        FileNotFoundError: no such recipe, or the result it starts from is not there.
        OSError: the disk is full or not writable. The last checkpoint stays.
    """
    loaded = Recipe.load(find_recipe(recipe))
    changes = {key: v for key, v in (("minutes", minutes), ("steps", steps)) if v is not None}
    return _train(replace(loaded, **changes), Path(out), model, progress)


def train_scenes(
    out: Path, *, chain: str = "scenes", scale: float = 1.0, progress: bool = True
) -> Path:
    """Train a scenes model: all its recipes in order, each resumable.

    Args:
        out: folder of the runs.
        chain: one of `CHAINS`: "scenes", from nothing, or "scenes-blip3o".
        scale: factor on steps, minutes and warm-up of every recipe; 1.0 makes the shipped model.
        progress: show a bar on stderr.

    Returns:
        The folder with the finished model.
    """
    if not scale > 0:
        raise ValueError(f"train_scenes: scale must be positive, got {scale}")
    for name in CHAINS[chain]:
        final = _train(_scaled(Recipe.load(find_recipe(name)), scale), Path(out), None, progress)
    return final


def stage_of(recipe: Recipe) -> Stage:
    """The stage a recipe names, fresh: `STAGE()` of `clipflow.training.stages.<stage>`.

    Raises:
        ValueError: there is no such stage.
    """
    return _stage_module(recipe).STAGE()


def _stage_module(recipe: Recipe) -> ModuleType:
    module = f"clipflow.training.stages.{recipe.stage}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the stage is there; something that it imports is not
        raise ValueError(f"recipe {recipe.name}: no stage {recipe.stage!r}") from error


def _train(recipe: Recipe, out: Path, model: nn.Module | None, progress: bool) -> Path:
    folder = out / recipe.name
    final = folder / "final"
    source = None if model is not None else _source(recipe, out)
    record = {"recipe": json.loads(json.dumps(asdict(recipe))), "origin": _origin(source)}
    earlier = _earlier_record(folder)
    if earlier is not None:
        _check_same_run(folder, earlier, record)
        length = [(r["recipe"]["steps"], r["recipe"]["minutes"]) for r in (earlier, record)]
        if earlier.get("finished") and length[0] == length[1] and final.is_dir():
            _log.info("%s: already trained, in %s", recipe.name, final)
            return final
    _write_record(folder, record)
    stage = stage_of(recipe)
    model = model if model is not None else _initial_model(recipe, source)
    fit(model, stage, recipe, folder, progress=progress)
    with writing(final, sum(p.nbytes for p in model.parameters())) as building:
        _save(model, building)
    _write_record(folder, {**record, "finished": True})
    return final


def _save(model: nn.Module, folder: Path) -> None:
    """Write a folder that `CLIPFlowPipeline.from_pretrained` opens: model and tokenizer."""
    # Imported here: it brings transformers and diffusers, which `--help` need not wait for.
    from clipflow.training.scenes_model import pipeline_of

    pipeline = pipeline_of(model)
    (model if pipeline is None else pipeline).save_pretrained(folder)


def _scaled(recipe: Recipe, scale: float) -> Recipe:
    return replace(
        recipe,
        steps=max(1, round(recipe.steps * scale)),
        minutes=recipe.minutes and recipe.minutes * scale,
        warmup_steps=round(recipe.warmup_steps * min(scale, 1.0)),
    )


def _source(recipe: Recipe, out: Path) -> Path | None:
    """The model folder that `init` names: an earlier result in `out`, or a folder as it is."""
    if recipe.init is None:
        return None
    for folder in (out / recipe.init / "final", Path(recipe.init)):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"recipe {recipe.name}: starts from {recipe.init!r}, but there is no model in "
        f"{out / recipe.init / 'final'}; train {recipe.init!r} first"
    )


def _origin(source: Path | None) -> str | None:
    """What tells one initial model from another: a hash of its weights."""
    if source is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.safetensors")):
        digest.update(sha256(path).encode())
    return digest.hexdigest()


def _initial_model(recipe: Recipe, source: Path | None) -> nn.Module:
    """The model in `source`, else the untrained one of the stage, else of the first chain."""
    # Imported here: they bring transformers and diffusers, which `--help` need not wait for.
    from clipflow.training import scenes_model

    if source is not None:
        return scenes_model.load(source)
    return getattr(_stage_module(recipe), "untrained", scenes_model.untrained)(recipe.seed)


def _check_same_run(folder: Path, earlier: dict[str, Any], record: dict[str, Any]) -> None:
    old, new = (_identity(r["recipe"]) for r in (earlier, record))
    changed = [key for key in new if old.get(key) != new[key]]
    if earlier["origin"] != record["origin"]:
        changed.append("the model it starts from")
    if changed:
        raise ValueError(
            f"training: {folder} holds a run that differs in {', '.join(changed)}; "
            "remove it or choose another folder"
        )


def _identity(recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe that makes two pieces the same run."""
    kept = {key: value for key, value in recipe.items() if key not in _MAY_CHANGE}
    options = {k: v for k, v in recipe["options"].items() if k not in _OPTIONS_MAY_CHANGE}
    return {**kept, "options": options}


def _earlier_record(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"recipe": dict(record["recipe"]), "origin": record["origin"], **record}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"training: {path} must be the record of a run, got {error!r}") from error


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json beside its place, then move it there whole."""
    path = folder / "run.json"
    beside = path.with_name("run.json.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno or 0, f"cannot write {path}: {error.strerror}") from error
