"""The embedded model draws the same pictures on every backend."""

import numpy as np
import pytest
import torch
from PIL.Image import Image

from clipflow import CLIPFlowPipeline, use_backend
from clipflow.registry import TRITON_INTERPRETED

PROMPTS = ["a red circle left of a blue square", "three green stars"]


@pytest.fixture(scope="module")
def pipe():
    pipe = CLIPFlowPipeline.from_pretrained("scenes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, backend: str, prompts: list[str], steps: int) -> list[Image]:
    """One drawn for each prompt, with seeds 0, 1, ...; and the first of them edited."""
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with use_backend(backend):
        drawn = pipe(prompts, num_inference_steps=steps, generator=seeds).images
        edited = pipe.edit(
            drawn[0],
            "make the circle green",
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
        ).images
    return [*drawn, *edited]


def largest_difference(ours: list[Image], theirs: list[Image]) -> int:
    """In steps of 1/255."""
    pairs = zip(map(np.asarray, ours), map(np.asarray, theirs), strict=True)
    return max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in pairs)


@pytest.mark.skipif(TRITON_INTERPRETED, reason="the interpreter's process tests Triton alone")
def test_native_draws_what_eager_draws(pipe):
    eager, native = (pictures(pipe, name, PROMPTS, 20) for name in ("eager", "native"))
    assert all(np.asarray(image).std() > 20 for image in eager)  # something was drawn
    assert largest_difference(native, eager) <= 1


@pytest.mark.skipif(not TRITON_INTERPRETED, reason="needs TRITON_INTERPRET=1, set at import")
def test_triton_draws_what_eager_draws(pipe):
    """One step of a corner of the picture, and no edit: the interpreter is slow."""
    noise = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    size = {"height": 16, "width": 16}
    drawn = {}
    for name in ("eager", "triton"):
        with use_backend(name):
            drawn[name] = pipe(PROMPTS[0], num_inference_steps=1, latents=noise, **size).images
    assert largest_difference(drawn["triton"], drawn["eager"]) <= 1
