"""The models of the package do what their cards say; all scores are those of `clipflow eval`."""

import pytest

from clipflow import CLIPFlowPipeline
from clipflow.evaluation.scenes import evaluate
from clipflow.pipelines.model_folders import EMBEDDED, find_model

MOST_MEGABYTES = 40


@pytest.fixture(scope="module", params=EMBEDDED)
def scores(request):
    pipe = CLIPFlowPipeline.from_pretrained(request.param)
    pipe.set_progress_bar_config(disable=True)
    return evaluate(pipe, prompts_per_tag=4, progress=False)


def test_they_are_small():
    files = [path for name in EMBEDDED for path in find_model(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_MEGABYTES * 1e6


@pytest.mark.parametrize(
    ("part", "least"), [("generation", 0.6), ("edits", 0.6), ("questions", 0.85)]
)
def test_they_draw_edit_and_answer(scores, part, least):
    assert scores[part]["all"]["score"] >= least  # of a few each; the cards have the bars


def test_they_classify_and_reconstruct(scores):
    assert scores["classification"]["score"] == 1.0
    assert scores["reconstruction"]["psnr"] > 30
