"""The embedded model draws the same pictures on every backend."""

import numpy as np
import pytest
import torch

from clipflow import CLIPFlowPipeline, use_backend
from clipflow.registry import TRITON_INTERPRETED

PROMPTS = ["a red circle left of a blue square", "three green stars"]


@pytest.fixture(scope="module")
def pipe():
    pipe = CLIPFlowPipeline.from_pretrained("scenes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, backend: str, steps: int) -> np.ndarray:
    """Two drawn and one edited, uint8 [3, H, W, 3]."""

    def seeds(count):
        return [torch.Generator().manual_seed(seed) for seed in range(count)]

    with use_backend(backend):
        drawn = pipe(PROMPTS, num_inference_steps=steps, generator=seeds(2)).images
        edited = pipe.edit(
            drawn[0], "make the circle green", num_inference_steps=steps, generator=seeds(1)
        ).images
    return np.stack([np.asarray(image) for image in [*drawn, *edited]])


@pytest.mark.skipif(TRITON_INTERPRETED, reason="the interpreter's process tests Triton alone")
def test_native_draws_what_eager_draws(pipe):
    eager, native = pictures(pipe, "eager", 20), pictures(pipe, "native", 20)
    assert eager.std() > 20  # something was drawn
    assert np.abs(eager.astype(int) - native.astype(int)).max() <= 1


@pytest.mark.skipif(not TRITON_INTERPRETED, reason="needs TRITON_INTERPRET=1, set at import")
def test_triton_draws_what_eager_draws(pipe):
    eager, triton = pictures(pipe, "eager", 1), pictures(pipe, "triton", 1)
    assert np.abs(eager.astype(int) - triton.astype(int)).max() <= 1
