"""Score a pipeline on the scenes: generation, edits, questions, classification, reconstruction.

Everything goes through the pipeline's public calls, and every picture it makes is read by the
detector; no score depends on a judge that could err in the model's favor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from clipflow.errors import InputError
from clipflow.pipelines.quality import psnr, ssim
from clipflow.sampling import StepCache
from clipflow.scenes import (
    EDIT_KINDS,
    QUESTION_KINDS,
    TAGS,
    Scene,
    agrees,
    check_answer,
    check_edit,
    check_prompt,
    detect,
    evaluation_edits,
    evaluation_prompts,
    evaluation_questions,
    is_held_out,
    labels,
    random_scene,
    render_batch,
)
from clipflow.scenes.world import CANVAS, LOOKS, Dice, place_objects, random_background

PARTS = ("generation", "edits", "questions", "classification", "reconstruction")

# PSNR of two equal pictures is infinite, which neither averages nor fits into JSON.
MAX_PSNR = 100.0

Score = dict[str, Any]


class Pipeline(Protocol):
    """What is asked of a pipeline; `CLIPFlowPipeline` has it."""

    def __call__(self, prompt: Sequence[str], **options: Any) -> Any: ...

    def edit(self, image: Sequence[Image.Image], prompt: Sequence[str], **options: Any) -> Any: ...

    def ask(self, image: Sequence[Image.Image], question: Sequence[str]) -> list[str]: ...

    def classify(
        self, image: Sequence[Image.Image], labels: Sequence[str]
    ) -> list[list[tuple[str, float]]]: ...

    def reconstruct(self, image: Sequence[Image.Image]) -> Any: ...


def evaluate(
    pipe: Pipeline,
    *,
    prompts_per_tag: int = 100,
    steps: int | None = None,
    guidance_scale: float | None = None,
    tier: str | None = None,
    step_cache: StepCache | None = None,
    seed: int = 0,
    batch_size: int = 50,
    parts: Sequence[str] = PARTS,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a pipeline; the same arguments give the same prompts, pictures and noise.

    Args:
        pipe: the pipeline. Its own progress bar is left as it is: switch it off beforehand.
        prompts_per_tag: prompts of each tag, edits of each kind, questions of each kind; twice
            as many pictures are classified and reconstructed.
        steps: solver steps of generation and editing; the model's default if None.
        guidance_scale: of generation and editing; the model's default if None.
        tier: of generation and editing; the pipeline's own if None.
        step_cache: of generation and editing.
        seed: draws prompts, pictures, questions and the noise that sampling starts from.
        batch_size: items in one call; it changes the speed, not what is asked.
        parts: which of `PARTS` to score.
        progress: show a bar.

    Returns:
        {"settings": {...}, "seconds": float, and for each part its scores}; with a step cache also
        "skipped_steps", the mean number of them in a picture. A score is
        {"score": share that is right, "count": items, "seen": {...}, "unseen": {...}}; the last
        two, where they are given, count the items without and with a held-out pair of looks.

    Raises:
        InputError: a count below 1 or an unknown part.
    """
    for name, value in (
        ("prompts_per_tag", prompts_per_tag),
        ("steps", steps),
        ("batch_size", batch_size),
    ):
        if value is not None and value < 1:
            raise InputError(f"evaluate: {name} must be at least 1, got {value}")
    unknown = set(parts) - set(PARTS)
    if unknown or not parts:
        raise InputError(f"evaluate: parts must be some of {', '.join(PARTS)}, got {list(parts)}")
    begin = time.monotonic()
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "tier": tier,
        "step_cache": step_cache,
    }
    run = _Run(pipe, prompts_per_tag, options, seed, batch_size, progress)
    result: dict[str, Any] = {
        "settings": {
            "prompts_per_tag": prompts_per_tag,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "tier": tier,
            "step_cache": None if step_cache is None else str(step_cache),
            "seed": seed,
        }
    }
    scorers: dict[str, Callable[[_Run], Score]] = {
        "generation": _generation,
        "edits": _edits,
        "questions": _questions,
        "classification": _classification,
        "reconstruction": _reconstruction,
    }
    for part in PARTS:
        if part in parts:
            result[part] = scorers[part](run)
    if run.skipped:
        result["skipped_steps"] = float(np.mean(run.skipped))
    return result | {"seconds": round(time.monotonic() - begin, 1)}


class _Run:
    """The arguments of one evaluation, and what its parts share."""

    def __init__(
        self,
        pipe: Pipeline,
        count: int,
        options: dict[str, Any],
        seed: int,
        batch_size: int,
        progress: bool,
    ) -> None:
        self.pipe, self.count, self.seed = pipe, count, seed
        self._options, self._batch_size, self._progress = options, batch_size, progress
        self.skipped: list[int] = []  # steps, of each picture that was sampled with a step cache

    def rng(self, part: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, PARTS.index(part), 1])

    def batches(self, part: str, count: int) -> Iterator[slice]:
        """Slices of `count` items, with a progress bar."""
        with tqdm(total=count, desc=part, disable=not self._progress) as bar:
            for begin in range(0, count, self._batch_size):
                yield slice(begin, min(begin + self._batch_size, count))
                bar.update(min(self._batch_size, count - begin))

    def sampling(self, batch: slice) -> dict[str, Any]:
        """Options of a generation call: a generator for each item, whatever its batch."""
        items = range(batch.start, batch.stop)
        return {
            **self._options,
            "generator": [torch.Generator().manual_seed(self.seed * 1_000_003 + i) for i in items],
        }

    def pictures(self, output: Any) -> list[Image.Image]:
        """The pictures of a generation call."""
        if self._options["step_cache"] is not None:
            self.skipped += map(len, output.skipped_steps)
        return output.images


def _draw(scenes: Sequence[Scene], rng: np.random.Generator) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in render_batch(scenes, rng)]


def _at_canvas(picture: Image.Image) -> Image.Image:
    """The picture at the size of the scenes, for models that draw larger ones."""
    if picture.size == (CANVAS, CANVAS):
        return picture
    return picture.resize((CANVAS, CANVAS), Image.Resampling.BOX)


def _read(picture: Image.Image) -> Scene:
    return detect(np.asarray(_at_canvas(picture).convert("RGB")))


def _share(right: Sequence[bool]) -> Score:
    return {"score": float(np.mean(right)) if len(right) else None, "count": len(right)}


def _split(right: Sequence[bool], seen: Sequence[bool]) -> Score:
    pairs = list(zip(right, seen, strict=True))
    score = _share(right)
    if not all(seen):
        score["seen"] = _share([r for r, s in pairs if s])
        score["unseen"] = _share([r for r, s in pairs if not s])
    return score


def _grouped(
    right: Sequence[bool], seen: Sequence[bool], groups: Sequence[str], names: Sequence[str]
) -> Score:
    """The score of all, and of each group."""
    rows = list(zip(right, seen, groups, strict=True))
    scores = {"all": _split(right, seen)}
    for name in names:
        own = [(r, s) for r, s, group in rows if group == name]
        scores[name] = _split([r for r, _ in own], [s for _, s in own])
    return scores


def _generation(run: _Run) -> Score:
    prompts = [p for tag in TAGS for p in evaluation_prompts(tag, run.count, run.seed)]
    right: list[bool] = []
    for batch in run.batches("generation", len(prompts)):
        part = prompts[batch]
        pictures = run.pictures(run.pipe([p.text for p in part], **run.sampling(batch)))
        right += [check_prompt(p, _read(x)) for p, x in zip(part, pictures, strict=True)]
    scores = _grouped(right, [p.seen for p in prompts], [p.tag for p in prompts], TAGS)
    forms: dict[str, list[bool]] = {}
    for prompt, is_right in zip(prompts, right, strict=True):
        if prompt.form is not None:
            forms.setdefault(prompt.form, []).append(is_right)
    scores["reasoning"]["forms"] = {form: _share(own) for form, own in sorted(forms.items())}
    return scores


def _edits(run: _Run) -> Score:
    edits = evaluation_edits(run.count * len(EDIT_KINDS), run.seed)
    before = _draw([e.before for e in edits], run.rng("edits"))
    right: list[bool] = []
    for batch in run.batches("edits", len(edits)):
        part = edits[batch]
        instructions = [e.instruction for e in part]
        output = run.pipe.edit(before[batch], instructions, **run.sampling(batch))
        pictures = run.pictures(output)
        right += [check_edit(e, _read(x)) for e, x in zip(part, pictures, strict=True)]
    return _grouped(right, [e.seen for e in edits], [e.kind for e in edits], EDIT_KINDS)


def _questions(run: _Run) -> Score:
    asked = evaluation_questions(run.count * len(QUESTION_KINDS), run.seed)
    pictures = _draw([scene for _, scene, _, _ in asked], run.rng("questions"))
    right: list[bool] = []
    for batch in run.batches("questions", len(asked)):
        part = asked[batch]
        answers = run.pipe.ask(pictures[batch], [question for _, _, question, _ in part])
        right += [
            check_answer(question, answer, given)
            for (_, _, question, answer), given in zip(part, answers, strict=True)
        ]
    seen = [not is_held_out(scene.objects) for _, scene, _, _ in asked]
    return _grouped(right, seen, [kind for kind, *_ in asked], QUESTION_KINDS)


def _classification(run: _Run) -> Score:
    """One object on any background; the 48 looks in turn."""
    rng = run.rng("classification")
    dice, names = Dice(rng), labels()
    truth = [i % len(LOOKS) for i in range(2 * run.count)]
    scenes = [
        place_objects(dice, [LOOKS[i]], [dice.below(9)], random_background(dice)) for i in truth
    ]
    pictures = _draw(scenes, rng)
    right: list[bool] = []
    for batch in run.batches("classification", len(scenes)):
        rankings = run.pipe.classify(pictures[batch], names)
        right += [
            ranking[0][0] == names[i] for ranking, i in zip(rankings, truth[batch], strict=True)
        ]
    return _share(right)


def _reconstruction(run: _Run) -> Score:
    rng = run.rng("reconstruction")
    scenes = [random_scene(rng, training=False) for _ in range(2 * run.count)]
    pictures = _draw(scenes, rng)
    made: list[Image.Image] = []
    for batch in run.batches("reconstruction", len(scenes)):
        made += [_at_canvas(x) for x in run.pipe.reconstruct(pictures[batch]).images]
    pairs = list(zip(pictures, made, strict=True))
    return {
        "psnr": float(np.mean([min(psnr(*pair), MAX_PSNR) for pair in pairs])),
        "ssim": float(np.mean([ssim(*pair) for pair in pairs])),
        "read_back": _share(
            [agrees(scene, _read(x)) for scene, x in zip(scenes, made, strict=True)]
        ),
        "count": len(pairs),
    }
