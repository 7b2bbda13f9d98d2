"""What plans bring to pipeline calls: mixed batches, batch invariance, tiers, memory, faults."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import tiny_pipeline

from clipflow.errors import InputError, SamplingError
from clipflow.pipelines.sampler import shared

TEXTS = ["a red circle", "two blue stars", "a green ring above a white square"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def dice(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, prompts, seeds, **more):
    options = {"num_inference_steps": 2, "output_type": "latent", **more}
    return pipe(prompts, generator=dice(*seeds), **options).images


@pytest.mark.parametrize("count", [2, 3, 5, 8, 17])
def test_batch_invariant_pictures_have_the_same_bits_alone(pipe, count):
    prompts = [TEXTS[k % 3] for k in range(count)]
    options = {"batch_invariant": True, "output_type": "pt"}
    batch = draw(pipe, prompts, range(count), **options)
    last = count - 1
    for k in {0, last // 2, last}:
        pipe.condition_cache.clear()
        assert torch.equal(batch[k : k + 1], draw(pipe, prompts[k], [k], **options))


@pytest.mark.parametrize("count", [2, 3, 5, 8, 17])
def test_batch_invariant_edits_have_the_same_bits_alone(pipe, count):
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)
    ]
    texts = [f"make the {color} circle green" for color in ("red", "blue", "white")]
    texts = [texts[k % 3] for k in range(count)]
    options = {"batch_invariant": True, "num_inference_steps": 2, "output_type": "pt"}
    batch = pipe.edit(pictures, texts, generator=dice(*range(count)), **options).images
    for k in {0, count - 1}:
        pipe.condition_cache.clear()
        alone = pipe.edit(pictures[k], texts[k], generator=dice(k), **options).images
        assert torch.equal(batch[k : k + 1], alone)


def test_one_call_may_mix_sizes_and_guidance(pipe):
    images = pipe(
        TEXTS,
        height=[64, 32, 96],
        width=[64, 48, 64],
        guidance_scale=[2.0, 1.0, 3.0],
        num_inference_steps=2,
        generator=dice(0, 1, 2),
    ).images
    assert [image.size for image in images] == [(64, 64), (48, 32), (64, 96)]
    alone = pipe(
        TEXTS[2], height=96, width=64, guidance_scale=3.0, num_inference_steps=2, generator=dice(2)
    ).images[0]
    difference = np.abs(np.asarray(images[2]).astype(int) - np.asarray(alone).astype(int))
    assert difference.max() <= 1
    latents = draw(pipe, TEXTS[:2], [0, 1], height=[64, 32], width=64)
    assert [list(one.shape) for one in latents] == [[16, 8, 8], [16, 4, 8]]
    assert pipe(TEXTS[0], num_inference_steps=1).images[0].size == (56, 56), "the native size"


def test_a_list_of_values_is_for_prompts_or_pictures(pipe):
    options = {"num_images_per_prompt": 2}
    by_prompt = draw(pipe, TEXTS[:2], range(4), guidance_scale=[2.0, 4.0], **options)
    by_picture = draw(pipe, TEXTS[:2], range(4), guidance_scale=[2.0, 2.0, 4.0, 4.0], **options)
    assert torch.equal(by_prompt, by_picture)
    with pytest.raises(InputError, match=r"list of 2 .* or 4"):
        draw(pipe, TEXTS[:2], range(4), guidance_scale=[2.0] * 3, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 60, "width": 64}, "height must be a multiple of 8"),
        ({"height": 64}, "width must be a multiple of 8 pixels, at least 8, got None"),
        ({"tier": "quick"}, "tier must be one of faithful, fast"),
        ({"guidance_interval": (0.5, 0.2)}, "0 <= start < end <= 1"),
        ({"guidance_interval": 0.5}, r"must be \(start, end\)"),
        ({"guidance_scale": [1.0, -1.0]}, "at least 0, got -1.0"),
    ],
)
def test_options_that_cannot_be(pipe, options, words):
    with pytest.raises(InputError, match=words):
        draw(pipe, TEXTS[:2], [0, 1], **options)


def test_pictures_of_one_prompt_share_its_condition(pipe):
    pipe.plans.clear()
    draw(pipe, TEXTS[0], range(4), num_images_per_prompt=4)
    (plan,) = pipe.plans.plans()
    assert plan.spec.conditions == (1, 1) and plan.spec.samples == 4
    assert plan.spec.condition_length % 64 == 0
    draw(pipe, TEXTS[1], range(4), num_images_per_prompt=4)
    assert len(pipe.plans.plans()) == 1, "another prompt is no other plan"


def test_shared_conditions():
    a, b, c = (torch.zeros(1) for _ in range(3))
    assert shared([a, a, b, b]) == [a, b]
    assert len(shared([a, a, a])) == 1
    assert len(shared([a, b, b])) == 3
    assert len(shared([a, b, c])) == 3


def test_tiers(pipe):
    faithful = draw(pipe, TEXTS, range(3))
    fast = draw(pipe, TEXTS, range(3), tier="fast")
    distance = (fast - faithful).norm() / faithful.norm()
    assert 0 < distance < 0.05
    pipe.tier = "fast"
    try:
        assert torch.equal(draw(pipe, TEXTS, range(3)), fast)
    finally:
        pipe.tier = "faithful"


def test_a_callback_that_raises_leaves_the_pipeline_usable(pipe):
    wanted = draw(pipe, TEXTS[0], [0])

    def fail(*_):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        draw(pipe, TEXTS[0], [0], callback_on_step_end=fail)
    assert torch.equal(draw(pipe, TEXTS[0], [0]), wanted)


def test_latents_that_go_wrong_are_named(pipe):
    noise = torch.full((1, 16, 8, 8), float("nan"))
    with pytest.raises(SamplingError, match=r"not finite after step 1 of 2 \(tier 'faithful'"):
        pipe(TEXTS[0], latents=noise, num_inference_steps=2)
