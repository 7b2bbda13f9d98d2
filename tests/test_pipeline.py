"""The pipeline around a tiny random model: calls, determinism, batches, folders, bad input."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import tiny_pipeline
from unilip_fixture import load_fixture

from clipflow import CLIPFlowPipeline
from clipflow.errors import InputError
from clipflow.pipelines.prompts import UnknownWordWarning
from clipflow.sampling import flow_schedule

STEPS = 3
PROMPTS = ["a red circle", "a photo of a blue square left of a green star", "three rings"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def draw(pipe, prompt, **options):
    options = {"num_inference_steps": STEPS, "output_type": "pt", **options}
    return pipe(prompt, **options).images


def test_output_types(pipe):
    def one(kind):
        return draw(pipe, "a red circle", generator=seeded(1), output_type=kind)

    tensor, array, (image,), latents = (one(kind) for kind in ("pt", "np", "pil", "latent"))
    assert tensor.shape == (1, 3, 56, 56) and tensor.min() >= 0 and tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(image), np.rint(array[0] * 255).astype(np.uint8))
    assert latents.shape == (1, *pipe.model.latent_shape) and latents.dtype == torch.float32
    decoded = pipe.model.decode(latents / pipe.model.config.unilip_factor)
    assert decoded.shape == (1, 3, 64, 64)


@torch.no_grad()
def test_native_resolution_is_what_was_decoded(pipe):
    latents = draw(pipe, "a red circle", generator=seeded(1), output_type="latent")
    native = draw(pipe, "a red circle", generator=seeded(1), output_resolution="native")
    decoded = pipe.model.decode(latents / pipe.model.config.unilip_factor)
    assert torch.equal(native, (decoded / 2 + 0.5).clamp(0, 1))
    sized = {"height": 64, "width": 64, "generator": seeded(1)}
    assert torch.equal(draw(pipe, "a red circle", **sized), native)


def test_noise_is_drawn_in_the_dtype_of_the_model_and_in_order():
    """One generator for four pictures gives the noise of four draws, in bfloat16 for UniLIP."""
    pipe = tiny_pipeline()
    pipe.model.config = dataclasses.replace(pipe.model.config, noise_dtype="bfloat16")
    seen = []
    draw(
        pipe,
        PROMPTS[:2],
        num_images_per_prompt=2,
        generator=seeded(3),
        solver="euler",
        callback_on_step_end=lambda p, step, t, tensors: seen.append(tensors["latents"].clone()),
    )
    dice = seeded(3)
    shape = (1, *pipe.model.latent_shape)
    noise = [torch.randn(shape, generator=dice, dtype=torch.bfloat16).float() for _ in range(4)]
    again = []
    draw(
        pipe,
        PROMPTS[:2],
        num_images_per_prompt=2,
        latents=torch.cat(noise),
        solver="euler",
        callback_on_step_end=lambda p, step, t, tensors: again.append(tensors["latents"].clone()),
    )
    assert torch.equal(seen[0], again[0])


def test_a_seed_means_one_picture(pipe):
    first = draw(pipe, "a red circle", generator=seeded(5))
    assert torch.equal(first, draw(pipe, "a red circle", generator=seeded(5)))
    assert not torch.equal(first, draw(pipe, "a red circle", generator=seeded(6)))
    assert not torch.equal(first, draw(pipe, "a blue circle", generator=seeded(5)))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_list_equals_one_by_one(pipe, guidance):
    options = {"guidance_scale": guidance, "num_inference_steps": 8}
    batch = draw(pipe, PROMPTS, generator=seeded(0, 1, 2), **options)
    for index, prompt in enumerate(PROMPTS):
        alone = draw(pipe, prompt, generator=seeded(index), **options)
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-5, rtol=0)


def test_pictures_of_one_prompt_lie_next_to_each_other(pipe):
    pictures = draw(pipe, PROMPTS[:2], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    for index in range(4):
        alone = draw(pipe, PROMPTS[index // 2], generator=seeded(index))
        torch.testing.assert_close(pictures[index : index + 1], alone, atol=1e-5, rtol=0)


def test_latents_take_the_place_of_noise(pipe):
    noise = torch.randn(1, *pipe.model.latent_shape, generator=seeded(3))
    given = draw(pipe, "a star", latents=noise)
    torch.testing.assert_close(given, draw(pipe, "a star", generator=seeded(3)))


def test_negative_prompt_steers(pipe):
    plain = draw(pipe, "a star", generator=seeded(0))
    empty = draw(pipe, "a star", negative_prompt="", generator=seeded(0))
    negative = draw(pipe, "a star", negative_prompt="a ring", generator=seeded(0))
    assert torch.equal(plain, empty) and not torch.equal(plain, negative)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_solvers_run(pipe, solver):
    assert draw(pipe, "a star", solver=solver).isfinite().all()


def test_return_dict(pipe):
    options = {"num_inference_steps": 1, "output_type": "np", "generator": seeded(0)}
    (images,) = pipe("a star", return_dict=False, **options)
    assert images.shape == (1, 56, 56, 3)


def test_callback_sees_steps_and_may_change_latents(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((pipeline, step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = draw(pipe, "a star", callback_on_step_end=callback, output_type="latent")
    times = flow_schedule(STEPS).timesteps.tolist()
    assert seen == [(pipe, step, times[step]) for step in range(STEPS)]
    assert not latents.any()


def test_edit_is_deterministic_and_a_list_equals_one_by_one(pipe, picture):
    other = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    texts = ["make the circle green", "remove the square"]
    options = {"num_inference_steps": STEPS, "output_type": "pt"}
    batch = pipe.edit([picture, other], texts, generator=seeded(0, 1), **options).images
    for index, image in enumerate([picture, other]):
        alone = pipe.edit(image, texts[index], generator=seeded(index), **options).images
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-5, rtol=0)
    several = pipe.edit(picture, texts, generator=seeded(0, 1), **options).images
    torch.testing.assert_close(several[:1], batch[:1], atol=1e-5, rtol=0)
    assert not torch.allclose(several[1:], batch[1:])


def test_edit_without_guidance(pipe, picture):
    result = pipe.edit(picture, "remove the square", guidance_scale=1.0, num_inference_steps=1)
    assert result.images[0].size == (56, 56)


def test_ask_lists_equal_one_by_one_and_streams_join(pipe, picture):
    questions = ["what colour is the circle?", "how many squares are there?"]
    options = {"max_new_tokens": 6}
    together = pipe.ask(picture, questions, **options)
    alone = [pipe.ask(picture, question, **options) for question in questions]
    assert together == alone and all(isinstance(answer, str) for answer in alone)
    streamed = pipe.ask(picture, questions[0], stream=True, **options)
    assert "".join(streamed) == alone[0]


def test_ask_equals_decoding_without_a_cache(pipe, picture):
    text = pipe.prompts.question("what is the background?")
    ids, mask = pipe.prompts.rows([text], pipe.device)
    features = pipe.model.encode_image(pipe.image_processor([picture]))
    said = []
    for _ in range(5):
        with torch.no_grad():
            token = pipe.model.logits(ids, mask, features)[0, -1].argmax().item()
        if token == pipe.model.config.tokens.im_end:
            break
        said.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        mask = torch.ones_like(ids)
    wanted = pipe.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert pipe.ask(picture, "what is the background?", max_new_tokens=5) == wanted


def test_classify_equals_scores_without_a_cache(pipe, picture):
    labels = ["a red circle", "a star", "a blue square on a sand background"]
    ranking = pipe.classify(picture, labels)
    assert [p for _, p in ranking] == sorted((p for _, p in ranking), reverse=True)
    assert sum(p for _, p in ranking) == pytest.approx(1)

    features = pipe.model.encode_image(pipe.image_processor([picture]))
    prompt = pipe.prompts.ids(pipe.prompts.question("describe the picture"))
    scores = []
    for label in labels:
        answer = [*pipe.prompts.ids(label), pipe.model.config.tokens.im_end]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = pipe.model.logits(ids, torch.ones_like(ids), features)[0]
        chances = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
        scores.append(chances.gather(-1, torch.tensor(answer)[:, None]).sum())
    wanted = dict(zip(labels, torch.stack(scores).softmax(0).tolist(), strict=True))
    assert dict(ranking) == pytest.approx(wanted, rel=1e-4)


def test_classify_takes_lists_and_many_labels(pipe, picture, monkeypatch):
    labels = ["a red circle", "a star", "two rings", "a cross", "a blue ring"]
    whole = pipe.classify([picture, picture], labels)
    monkeypatch.setattr("clipflow.pipelines.understanding.TREE_TOKENS", 2)
    assert dict(pipe.classify(picture, labels)) == pytest.approx(dict(whole[0]))
    assert len(whole) == 2


def test_reconstruct(pipe, picture):
    (image,) = pipe.reconstruct(picture).images
    assert image.size == (56, 56)
    latents = pipe.reconstruct([picture, picture], output_type="latent").images
    assert latents.shape == (2, *pipe.model.latent_shape)


def test_save_and_load_give_the_same_pictures(pipe, picture, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    loaded = CLIPFlowPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    for name, tensor in pipe.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    assert loaded.image_processor == pipe.image_processor and loaded.defaults == pipe.defaults
    wanted = draw(pipe, "a red star", generator=seeded(0))
    assert torch.equal(draw(loaded, "a red star", generator=seeded(0)), wanted)
    assert loaded.classify(picture, ["a star"]) == pipe.classify(picture, ["a star"])


def test_bfloat16_draws_nearly_the_same():
    half = tiny_pipeline().to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.model.vae_decoder.decoder.conv_in.weight.dtype == torch.float32
    options = {"generator": seeded(0), "guidance_scale": 1.0}
    found = draw(half, "a star", **options)
    wanted = draw(tiny_pipeline(), "a star", **options | {"generator": seeded(0)})
    assert (found - wanted).abs().mean() < 0.02


def test_unknown_words_are_warned_about(pipe):
    with pytest.warns(UnknownWordWarning, match="does not know .zeppelin."):
        draw(pipe, "a zeppelin", num_inference_steps=1)


def test_progress_bar_can_be_switched_off(capfd):
    loud = tiny_pipeline()
    loud.set_progress_bar_config(disable=False)
    draw(loud, "a star", num_inference_steps=2)
    assert "2/2" in capfd.readouterr().err
    loud.set_progress_bar_config(disable=True)
    draw(loud, "a star", num_inference_steps=2)
    assert not capfd.readouterr().err


BAD_CALLS = [
    ({"prompt": ""}, "must not be empty"),
    ({"prompt": "  "}, "must not be empty"),
    ({"prompt": []}, "empty list"),
    ({"prompt": 3}, "must be a text, got int"),
    ({"prompt": ["a star", ""]}, "must not be empty"),
    ({"prompt": "a <img> star"}, "marker '<img>'"),
    ({"prompt": "a " * 3000}, "tokens in all"),
    ({"num_inference_steps": 0}, "from 1 to 1000, got 0"),
    ({"num_inference_steps": 2.5}, "got 2.5"),
    ({"guidance_scale": -1.0}, "at least 0, got -1.0"),
    ({"guidance_scale": float("nan")}, "got nan"),
    ({"solver": "ddim"}, "dpmpp_2m, euler, heun, got 'ddim'"),
    ({"num_images_per_prompt": 0}, "at least 1, got 0"),
    ({"output_type": "gif"}, "got 'gif'"),
    ({"output_resolution": 512}, "model, native, got 512"),
    ({"generator": [torch.Generator()] * 3}, "list of 3"),
    ({"latents": torch.zeros(1, 2, 3)}, r"latents must be \[1, 16, 8, 8\], got \[1, 2, 3\]"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text or a list of 1, got 2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS, ids=lambda v: str(v)[:40])
def test_bad_calls_say_what_is_wrong(pipe, changes, message):
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "a star", "num_inference_steps": 1, **changes})


def test_bad_understanding_calls_say_what_is_wrong(pipe, picture):
    with pytest.raises(InputError, match="2 images and 3 texts"):
        pipe.ask([picture] * 2, ["what?"] * 3)
    with pytest.raises(InputError, match="must not be empty"):
        pipe.ask(picture, "")
    with pytest.raises(InputError, match="one question, got 2"):
        pipe.ask(picture, ["what?"] * 2, stream=True)
    for labels in ([], "a star"):
        with pytest.raises(InputError, match="labels must be a list"):
            pipe.classify(picture, labels)
    with pytest.raises(InputError, match="label must not be empty"):
        pipe.classify(picture, ["a star", ""])
    with pytest.raises(InputError, match="max_new_tokens"):
        pipe.ask(picture, "what?", max_new_tokens=0)


def test_unknown_models_say_what_was_found(tmp_path):
    with pytest.raises(InputError, match="'no-such-model' is unknown"):
        CLIPFlowPipeline.from_pretrained("no-such-model")
    with pytest.raises(InputError, match="got an empty folder"):
        CLIPFlowPipeline.from_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"must hold config.json .*got notes.txt"):
        CLIPFlowPipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="got a file"):
        CLIPFlowPipeline.from_pretrained(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("model.safetensors", "not safetensors"),
        ("tokenizer.json", "{}"),
        ("preprocessor_config.json", "{}"),
        ("generation_config.json", json.dumps({"default_guidance_scale": -1})),
    ],
)
def test_broken_model_folders_are_refused(pipe, tmp_path, name, content):
    pipe.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError):
        CLIPFlowPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("tag", ["t2i_left", "edit_left"])
def test_calls_give_the_recorded_latents_and_picture(tag, monkeypatch):
    """Through the public calls; only the tokens and pixel values are the recorded ones."""
    fixture = load_fixture()
    recorded = fixture.tensors
    pipe = CLIPFlowPipeline(fixture.model, tiny_pipeline().tokenizer)
    pipe.set_progress_bar_config(disable=True)
    tokens = [recorded[f"{tag}.{name}"] for name in ("input_ids", "attention_mask")]
    monkeypatch.setattr(pipe.prompts, "rows", lambda texts, device: tokens)
    monkeypatch.setattr(pipe, "image_processor", lambda images: recorded["image.pixel_values"])
    options = {"latents": recorded["noise"], "guidance_scale": 4.5}

    def call(**more):
        if tag.startswith("edit"):
            return pipe.edit(Image.new("RGB", (4, 4)), "as recorded", **options, **more).images
        return pipe("as recorded", **options, **more).images

    latents = call(num_inference_steps=4, output_type="latent")
    wanted = recorded[f"{tag}.latent_4steps_g4.5"]
    torch.testing.assert_close(latents, wanted, atol=2e-5, rtol=1e-5)
    (picture,) = call(num_inference_steps=20)
    pixels = torch.from_numpy(np.array(picture)).int()
    found, wanted = fixture.pair(f"{tag}.image_448_hwc_uint8_20steps_g4.5", pixels)
    assert (found - wanted.int()).abs().max() <= 1  # rounding of a float that is off by 1e-6
