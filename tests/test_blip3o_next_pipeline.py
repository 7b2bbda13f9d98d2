"""BLIP3o-NEXT through the public pipeline: its image tokens, noise and refusals."""

import dataclasses

import pytest
import torch

from clipflow import CLIPFlowPipeline, FeatureDecoding, ImageTokenSampling
from clipflow.cli.main import main as clipflow
from clipflow.errors import InputError
from clipflow.testing import write_blip3o_next_folder

PROMPTS = ["a fox", "a much longer prompt of a fox in the snow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_blip3o_next_folder(tmp_path_factory.mktemp("next") / "model")


def load(folder):
    pipe = CLIPFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    # The published number of image tokens, 729, would take the tests most of their time.
    pipe.model.config = dataclasses.replace(pipe.model.config, tokens_per_image=9)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


def draw(pipe, prompts, seeds, **options):
    dice = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": 2, "output_type": "latent", **options}
    return pipe(prompts, generator=dice, **options).images


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_picture_is_the_same_in_a_batch_and_alone(pipe):
    together = draw(pipe, PROMPTS, [0, 1])
    for prompt, seed, found in zip(PROMPTS, [0, 1], together, strict=True):
        close(found, draw(pipe, [prompt], [seed])[0])
    assert torch.equal(
        draw(pipe, PROMPTS, [0, 1], batch_invariant=True)[1],
        draw(pipe, PROMPTS[1:], [1], batch_invariant=True)[0],
    )


def test_each_picture_of_a_prompt_has_tokens_of_its_own(pipe):
    noise = torch.randn(1, 32, 32, 32).expand(2, -1, -1, -1)
    one, other = draw(pipe, PROMPTS[0], [0, 1], num_images_per_prompt=2, latents=noise)
    assert not torch.allclose(one, other, atol=1e-3), "only the tokens differ"
    likeliest = ImageTokenSampling(temperature=0)
    one, other = draw(
        pipe, PROMPTS[0], [0, 1], num_images_per_prompt=2, latents=noise, image_tokens=likeliest
    )
    close(one, other)


def test_guidance_and_negative_prompts_count(pipe):
    plain = draw(pipe, PROMPTS[0], [0])
    assert not torch.allclose(plain, draw(pipe, PROMPTS[0], [0], guidance_scale=1.0), atol=1e-4)
    steered = draw(pipe, PROMPTS[0], [0], negative_prompt="a dog")
    assert not torch.allclose(plain, steered, atol=1e-4)
    close(plain, draw(pipe, PROMPTS[0], [0], negative_prompt=None))


def test_any_token_may_be_drawn_if_asked(pipe, monkeypatch):
    seen = []
    encode = type(pipe.model).encode_condition

    def watched(model, *args, **options):
        seen.append(options["allow_any_token"])
        return encode(model, *args, **options)

    monkeypatch.setattr(type(pipe.model), "encode_condition", watched)
    image_only = draw(pipe, PROMPTS[0], [0])
    any_token = draw(pipe, PROMPTS[0], [0], image_tokens=ImageTokenSampling(allow_any_token=True))
    assert seen == [False, True] and not torch.equal(image_only, any_token)


def test_pixels_are_of_the_decoders_size(pipe):
    (picture,) = draw(pipe, PROMPTS[0], [0], output_type="pt", height=128, width=96)
    assert picture.shape == (3, 128, 96) and picture.isfinite().all()


def test_a_saved_pipeline_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    again = CLIPFlowPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    state = pipe.model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in again.model.state_dict().items())
    close(draw(again, PROMPTS[0], [0]), draw(pipe, PROMPTS[0], [0]))


@pytest.mark.parametrize("call", ["edit", "ask", "chat", "classify", "reconstruct"])
def test_what_it_cannot_do_is_refused_with_the_reason(pipe, call):
    picture = torch.zeros(3, 8, 8)
    arguments = {
        "edit": (picture, "make it night"),
        "ask": (picture, "what is it?"),
        "chat": ([{"role": "user", "content": "hello"}],),
        "classify": (picture, ["a fox"]),
        "reconstruct": (picture,),
    }
    with pytest.raises(InputError, match=rf"^{call}: .*BLIP3o-NEXT"):
        getattr(pipe, call)(*arguments[call])
    with pytest.raises(InputError, match="ask: "):
        pipe.feature_cache.clear()


def test_options_of_other_families_are_refused(pipe):
    with pytest.raises(InputError, match="decoding must not be given for BLIP3o-NEXT"):
        pipe(PROMPTS[0], decoding=FeatureDecoding())


def test_memory_is_estimated(folder):
    one = CLIPFlowPipeline.memory_estimate(folder)
    two = CLIPFlowPipeline.memory_estimate(folder, num_images=2)
    assert 0 < one.total_weights == two.total_weights and one.plan < two.plan
    assert one.conditions * 2 == two.conditions


def test_the_command_hands_on_that_any_token_is_allowed(tmp_path, capsys):
    target = str(tmp_path / "fox.png")
    assert clipflow(["generate", "a fox", "-o", target, "--allow-any-token"]) == 2
    assert "image_tokens must not be given for UniLIP" in capsys.readouterr().err
