"""The scores of a pipeline that is always right are 1, of one that draws nothing are 0."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from clipflow.errors import InputError
from clipflow.evaluation.fidelity import fidelity, fidelity_prompts
from clipflow.evaluation.scenes import MAX_PSNR, PARTS, evaluate
from clipflow.evaluation.table import format_table
from clipflow.pipelines.quality import psnr, ssim
from clipflow.sampling import TaylorForecast
from clipflow.scenes import (
    EDIT_KINDS,
    QUESTION_KINDS,
    TAGS,
    Scene,
    caption,
    detect,
    draw_scene,
    evaluation_edits,
    evaluation_prompts,
    evaluation_questions,
    render,
)

COUNT, SEED = 5, 3


def read(picture: Image.Image) -> tuple[str, frozenset]:
    scene = detect(np.asarray(picture))
    return scene.background, frozenset(scene.objects)


def output(scenes: list[Scene]) -> SimpleNamespace:
    rng = np.random.default_rng(0)
    return SimpleNamespace(images=[Image.fromarray(render(scene, rng)) for scene in scenes])


class Perfect:
    """Knows the evaluation by heart."""

    def __init__(self) -> None:
        prompts = [p for tag in TAGS for p in evaluation_prompts(tag, COUNT, SEED)]
        self.prompts = {p.text: p for p in prompts}
        self.edits = {
            (e.before.background, frozenset(e.before.objects), e.instruction): e.after
            for e in evaluation_edits(COUNT * len(EDIT_KINDS), SEED)
        }
        self.answers = {
            (scene.background, frozenset(scene.objects), question): answer
            for _, scene, question, answer in evaluation_questions(
                COUNT * len(QUESTION_KINDS), SEED
            )
        }
        self.calls: list[int] = []
        self.options: list[tuple] = []

    def __call__(
        self, prompt, *, num_inference_steps, guidance_scale, generator, tier=None, step_cache=None
    ):
        assert num_inference_steps == 7 and guidance_scale == 2.0
        assert len(generator) == len(prompt)
        self.options.append((tier, step_cache))
        self.calls.append(len(prompt))
        rng = np.random.default_rng(0)
        made = output([draw_scene(rng, self.prompts[text], training=False) for text in prompt])
        made.skipped_steps = () if step_cache is None else ((1, 2),) * len(prompt)
        return made

    def edit(self, image, prompt, *, num_inference_steps, guidance_scale, generator, **fast):
        pairs = zip(image, prompt, strict=True)
        made = output([self.edits[(*read(picture), text)] for picture, text in pairs])
        made.skipped_steps = () if fast["step_cache"] is None else ((1,),) * len(prompt)
        return made

    def ask(self, image, question):
        pairs = zip(image, question, strict=True)
        return [self.answers[(*read(picture), text)] for picture, text in pairs]

    def classify(self, image, labels):
        return [self.rank(detect(np.asarray(picture)), labels) for picture in image]

    def rank(self, scene, labels):
        right = caption(Scene("gray", scene.objects))
        return sorted(((label, float(label == right)) for label in labels), key=lambda p: -p[1])

    def reconstruct(self, image):
        return SimpleNamespace(images=image)


class Blank(Perfect):
    """Draws empty pictures, says nothing and always names the label of a white ring."""

    def __call__(self, prompt, **options):
        return output([Scene("gray", ())] * len(prompt))

    def edit(self, image, prompt, **options):
        return self(prompt)

    def ask(self, image, question):
        return [""] * len(question)

    def rank(self, scene, labels):
        return [(label, 1 / len(labels)) for label in reversed(labels)]

    def reconstruct(self, image):
        return self(image)


def scores_of(pipe, **options):
    options = {"prompts_per_tag": COUNT, "seed": SEED, "progress": False} | options
    return evaluate(pipe, steps=7, guidance_scale=2.0, **options)


def test_perfect_pipeline_scores_one():
    pipe = Perfect()
    result = scores_of(pipe, batch_size=12)
    assert pipe.calls == [12, 12, 12, 4], "prompts come in batches over all tags"
    for part, kinds in (("generation", TAGS), ("edits", EDIT_KINDS), ("questions", QUESTION_KINDS)):
        assert list(result[part]) == ["all", *kinds]
        assert {score["score"] for score in result[part].values()} == {1.0}
        assert all(score["count"] == COUNT for kind, score in result[part].items() if kind != "all")
    assert result["generation"]["color_attr"]["unseen"] == {"score": 1.0, "count": 1}
    assert "unseen" not in result["generation"]["counting"]
    assert sum(own["count"] for own in result["generation"]["reasoning"]["forms"].values()) == COUNT
    assert result["classification"] == {"score": 1.0, "count": 2 * COUNT}
    own = result["reconstruction"]
    assert (own["psnr"], own["ssim"], own["read_back"]["score"]) == (MAX_PSNR, 1.0, 1.0)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_blank_pipeline_scores_zero():
    result = scores_of(Blank())
    for part in ("generation", "edits", "questions"):
        assert {score["score"] for score in result[part].values()} == {0.0}
    assert result["classification"]["score"] == 0.0
    assert result["reconstruction"]["read_back"]["score"] == 0.0
    assert result["reconstruction"]["psnr"] < 26


def test_table_has_a_row_for_each_score():
    text = format_table(scores_of(Perfect()))
    for name in (*TAGS, *EDIT_KINDS, *QUESTION_KINDS, "48 labels", "PSNR dB", "SSIM", "read back"):
        assert name in text
    assert "steps 7" in text and max(map(len, text.splitlines())) <= 100
    partial = format_table(scores_of(Perfect(), parts=["questions"]))
    assert "generation" not in partial and "describe" in partial


def test_tier_and_step_cache_reach_the_pipeline():
    pipe, cache = Perfect(), TaylorForecast(interval=3)
    options = {"tier": "fast", "step_cache": cache, "parts": ["generation", "edits"]}
    result = scores_of(pipe, **options)
    assert set(pipe.options) == {("fast", cache)}
    pictures = COUNT * len(TAGS), COUNT * len(EDIT_KINDS)
    mean = (2 * pictures[0] + pictures[1]) / sum(pictures)
    assert result["skipped_steps"] == pytest.approx(mean)
    assert result["settings"]["tier"] == "fast"
    assert "TaylorForecast(interval=3" in result["settings"]["step_cache"]
    assert f"steps skipped in a picture: {mean:.2f}" in format_table(result)
    assert "skipped_steps" not in scores_of(Perfect(), parts=["generation"])


def test_fidelity_compares_with_faithful_pictures():
    pipe = Perfect()
    texts = fidelity_prompts(1, SEED)
    assert len(texts) == len(TAGS) and texts[0] in pipe.prompts

    def drawn(prompt, *, tier, generator, step_cache=None, **_):
        level = 100 + 10 * (tier == "fast")
        images = [Image.new("RGB", (8, 8), (level,) * 3) for _ in prompt]
        skipped = () if step_cache is None else ((1, 2),) * len(prompt)
        return SimpleNamespace(images=images, skipped_steps=skipped)

    far = fidelity(drawn, texts, tier="fast", batch_size=3, progress=False)
    assert far["psnr"] == far["lowest_psnr"] == pytest.approx(20 * np.log10(25.5))
    assert far["mean_absolute_difference"] == pytest.approx(10 / 255)
    assert far["skipped_steps"] == 0 and far["count"] == len(TAGS)
    same = fidelity(drawn, texts, step_cache=TaylorForecast(), progress=False)
    assert same["psnr"] == MAX_PSNR and same["skipped_steps"] == 2
    with pytest.raises(InputError, match="there must be a prompt"):
        fidelity(drawn, [])


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="prompts_per_tag must be at least 1, got 0"):
        evaluate(Perfect(), prompts_per_tag=0)
    with pytest.raises(InputError, match=r"parts must be some of generation.*got \['poetry'\]"):
        evaluate(Perfect(), parts=["poetry"])
    assert "reconstruction" in PARTS


def test_psnr_and_ssim_known_values():
    flat = Image.new("RGB", (16, 16), (100, 100, 100))
    shifted = Image.new("RGB", (16, 16), (110, 110, 110))
    assert psnr(flat, shifted) == pytest.approx(20 * np.log10(25.5))
    x, y, c = 100 / 255, 110 / 255, 0.01**2
    assert ssim(flat, shifted) == pytest.approx((2 * x * y + c) / (x**2 + y**2 + c))
    assert psnr(flat, flat) == np.inf and ssim(flat, flat) == pytest.approx(1.0)
