"""BLIP3-o through the public pipeline: drawing, null features, edits and reconstruction."""

import dataclasses

import pytest
import torch
from PIL import Image

from clipflow import CLIPFlowPipeline, FeatureDecoding
from clipflow.cli.main import main as clipflow
from clipflow.errors import InputError, NotEnoughMemory
from clipflow.models.blip3o import BLIP3oModel
from clipflow.models.blip3o.eva import EVAConfig
from clipflow.testing import write_blip3o_folder

PROMPTS = ["a fox", "a much longer prompt of a fox in the snow"]
PICTURE = Image.new("RGB", (60, 40), (200, 30, 30))
SMALL = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_blip3o_folder(tmp_path_factory.mktemp("blip3o") / "model")


def load(folder):
    pipe = CLIPFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


def dice(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def features(pipe, prompts, seeds, **options):
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    return pipe(prompts, generator=dice(*seeds), **options).images


def pixels(pipe, seed, **decoding):
    decoding = FeatureDecoding(**{"num_inference_steps": 2, **decoding})
    options = {"num_inference_steps": 3, "output_type": "pt", "decoding": decoding, **SMALL}
    return pipe(PROMPTS[0], generator=dice(seed), **options).images[0]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_defaults_are_the_authors(pipe):
    defaults = pipe.defaults
    found = (defaults.num_inference_steps, defaults.guidance_scale, defaults.solver)
    assert found == (30, 3.0, "euler")
    plan = pipe.sampler.runs(pipe.sampling_options(1, generator=None, output_type="latent"))
    assert [run.guided for run in plan] == [True]
    times = pipe.family.schedule(pipe.model.config, 30).timesteps
    assert times[:2].tolist() == [1000, 966], "whole times, cut and not rounded"


def test_a_picture_is_the_same_in_a_batch_and_alone(pipe):
    together = features(pipe, PROMPTS, [0, 1])
    assert together.shape == (2, *pipe.model.latent_shape)
    for prompt, seed, found in zip(PROMPTS, [0, 1], together, strict=True):
        close(found, features(pipe, [prompt], [seed])[0])
    invariant = {"batch_invariant": True}
    both = features(pipe, PROMPTS, [0, 1], **invariant)
    assert torch.equal(both[1], features(pipe, PROMPTS[1:], [1], **invariant)[0])
    drawn = pipe(PROMPTS, generator=dice(0, 1), **drawing()).images
    alone = pipe(PROMPTS[1], generator=dice(1), **drawing()).images
    close(drawn[1], alone[0])


def drawing():
    decoding = FeatureDecoding(num_inference_steps=2, null="zero")
    return {"num_inference_steps": 3, "output_type": "pt", "decoding": decoding, **SMALL}


def test_several_pictures_of_a_prompt_read_it_once(pipe):
    pipe.condition_cache.clear()
    before = pipe.condition_cache.statistics()
    features(pipe, PROMPTS[0], [0, 1, 2], num_images_per_prompt=3)
    after = pipe.condition_cache.statistics()
    assert after.entries == 2 and after.misses - before.misses == 2, "the prompt and the null"


def test_guidance_and_negative_prompts_count(pipe):
    plain = features(pipe, PROMPTS[0], [0])
    assert not torch.allclose(plain, features(pipe, PROMPTS[0], [0], guidance_scale=1.0))
    steered = features(pipe, PROMPTS[0], [0], negative_prompt="a dog")
    assert not torch.allclose(plain, steered)


class TestNullFeatures:
    def test_are_sampled_once_and_from_a_seed_of_their_own(self, folder):
        pipe = load(folder)
        first = pixels(pipe, 3)
        entries = pipe.condition_cache.statistics().entries
        assert torch.equal(pixels(pipe, 3), first), "unlike the reference, whose first differs"
        assert pipe.condition_cache.statistics().entries == entries
        close(pixels(load(folder), 3), first)
        assert not torch.allclose(pixels(pipe, 3, null_seed=1), first, atol=1e-4)

    def test_may_be_zeros(self, pipe):
        zero = pixels(pipe, 3, null="zero")
        assert not torch.allclose(zero, pixels(pipe, 3), atol=1e-4)
        assert torch.equal(zero, pixels(pipe, 3, null="zero", null_seed=5))

    def test_are_not_needed_without_guidance(self, folder):
        pipe = load(folder)
        pixels(pipe, 3, guidance_scale=1.0)
        keys = [key for key in pipe.condition_cache._entries if "null features" in str(key)]
        assert not keys

    def test_are_forgotten_with_the_weights(self, folder):
        pipe = load(folder)
        before = pixels(pipe, 3)
        with torch.no_grad():
            pipe.model.dit.norm_out["linear_2"].weight.mul_(1.5)
        pipe.plans.clear()
        assert not torch.allclose(pixels(pipe, 3), before, atol=1e-4)


class TestEdits:
    def test_are_refused_where_the_model_was_not_trained_to(self, pipe):
        with pytest.raises(InputError, match=r"^edit: this BLIP3-o was trained to draw"):
            pipe.edit(PICTURE, "make it night")

    def test_read_picture_and_instruction(self, folder):
        pipe = load(folder)
        pipe.model.config = dataclasses.replace(pipe.model.config, edits=True)
        options = {"num_inference_steps": 2, "output_type": "latent"}
        one = pipe.edit(PICTURE, "make it night", generator=dice(0), **options).images
        other = pipe.edit(PICTURE, "by day", generator=dice(0), **options).images
        third = pipe.edit(
            Image.new("RGB", (9, 9)), "make it night", generator=dice(0), **options
        ).images
        assert not torch.allclose(one, other) and not torch.allclose(one, third)


class TestReconstruction:
    def test_is_the_same_each_time(self, pipe):
        one = pipe.reconstruct(PICTURE, output_type="latent").images
        assert torch.equal(one, pipe.reconstruct(PICTURE, output_type="latent").images)
        two = pipe.reconstruct([PICTURE, PICTURE.rotate(90)], output_type="latent").images
        close(two[:1], one)

    def test_goes_through_the_target_where_there_is_one(self, folder, monkeypatch):
        config = load(folder).model.config
        target = EVAConfig(
            image_size=64,
            patch_size=4,
            hidden_size=config.latent_channels,
            num_hidden_layers=1,
            num_attention_heads=7,
            intermediate_size=32,
            layer_norm_eps=1e-6,
            pool=2,
        )
        torch.manual_seed(0)
        model = BLIP3oModel(dataclasses.replace(config, target=target))
        pipe = CLIPFlowPipeline(model, load(folder).tokenizer)
        size = target.image_size
        square = PICTURE.crop((10, 0, 50, 40)).resize((size, size), Image.Resampling.BICUBIC)
        found = pipe.reconstruct(PICTURE, output_type="latent").images
        close(found, pipe.reconstruct(square, output_type="latent").images)
        assert found.shape == (1, *model.latent_shape)
        monkeypatch.setattr("clipflow.sampling.memory.available_bytes", lambda device: 1000)
        with pytest.raises(NotEnoughMemory, match="seeing 2 pictures"):
            pipe.reconstruct([PICTURE, PICTURE], output_type="latent")

    def test_has_one_resolution(self, pipe):
        with pytest.raises(InputError, match="resolution must not be given for BLIP3-o"):
            pipe.reconstruct(PICTURE, resolution=224)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "from 1 to 1000, got 0"),
        ({"guidance_scale": float("nan")}, "at least 0, got nan"),
        ({"null": "none"}, "one of sampled, zero, got 'none'"),
        ({"null_seed": -1}, "from 0 on, got -1"),
    ],
)
def test_bad_decoding_is_refused(options, message):
    with pytest.raises(InputError, match=f"^decoding: .*{message}"):
        FeatureDecoding(**options)


def test_a_model_without_a_decoder_draws_features(tmp_path):
    pipe = load(write_blip3o_folder(tmp_path / "model", decoder=False))
    assert features(pipe, PROMPTS[0], [0]).isfinite().all()
    with pytest.raises(InputError, match=r"has no decoder, .* diffusion-decoder/"):
        pipe(PROMPTS[0], num_inference_steps=1)


def test_sides_are_those_of_the_decoder(pipe):
    with pytest.raises(InputError, match="height must be a multiple of 8 pixels, got 60"):
        pipe(PROMPTS[0], height=60, width=64)


def test_memory_is_estimated(folder, pipe):
    one = CLIPFlowPipeline.memory_estimate(folder)
    assert one.decode > 0 and one.weights["decoder"] > 0
    assert one.as_dict() == pipe.memory_estimate().as_dict()
    large = pipe.memory_estimate(height=1024, width=1024, num_images=2)
    assert large.decode > 8 * one.decode and large.plan > one.plan


def test_commands_take_the_decoders_options(folder, tmp_path, capsys):
    target = tmp_path / "fox.png"
    options = ["--steps", "2", "--decoder-steps", "2", "--decoder-null", "zero", "--seed", "0"]
    command = ["generate", "a fox", "-o", str(target), "--model", str(folder), *options]
    assert clipflow(command) == 0 and target.is_file()
    command = ["generate", "a fox", "-o", str(target), "--decoder-steps", "2"]
    assert clipflow(command) == 2
    assert "decoding must not be given for UniLIP" in capsys.readouterr().err
