"""All that a pipeline can do, on random folders of the published form, from Python and the shell.

Folders of one seed hold the same weights whatever their form, so what is drawn from them is equal.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipflow import CLIPFlowPipeline
from clipflow.cli import main
from clipflow.models.unilip.keys import own_name
from clipflow.pipelines.image_io import load_image
from clipflow.testing import write_unilip_folder

PROMPTS = ["a fox in the snow", "二つの青い星, 2 of them"]
FEW = {"num_inference_steps": 2}
FORMS = {
    "shards": {"max_shard_size": "1MB"},
    "reverse": {"prefixes": "reverse_mapped", "tokenizer": "fast"},
    "tied": {"tied_head": True, "preprocessor": True},
    "both": {"max_shard_size": "1MB", "prefixes": "reverse_mapped", "tied_head": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_unilip_folder(tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


@pytest.fixture(scope="module")
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((300, 180), Image.Resampling.BICUBIC)


def load(folder, **options):
    pipe = CLIPFlowPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dice(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents(pipe, prompt=PROMPTS[0], **options):
    options = {"generator": dice(0)} | options
    return pipe(prompt, output_type="latent", **FEW, **options).images


def edited(pipe, image, text, *seeds, **options):
    return pipe.edit(
        image, text, output_type="latent", generator=dice(*seeds), **FEW, **options
    ).images


def far(first, second):
    """Distance relative to the second's length."""
    return ((first - second).norm() / second.norm()).item()


def test_several_pictures_of_a_prompt(pipe):
    pictures = pipe(PROMPTS[0], num_images_per_prompt=2, generator=dice(0, 1), **FEW).images
    assert [picture.size for picture in pictures] == [(448, 448)] * 2
    first, second = (np.asarray(picture) for picture in pictures)
    assert (first != second).any() and first.std() > 10
    native = pipe(PROMPTS[0], output_resolution="native", **FEW).images[0]
    assert native.size == (512, 512)
    assert pipe.defaults.guidance_scale == 4.5 and pipe.defaults.num_inference_steps == 20


def test_a_batch_of_prompts_is_as_one_by_one(pipe):
    together = latents(pipe, PROMPTS, generator=dice(3, 4))
    for place, prompt in enumerate(PROMPTS):
        alone = latents(pipe, prompt, generator=dice(3 + place))
        assert far(together[place : place + 1], alone) < 1e-5
    assert far(together[:1], together[1:]) > 0.1


def test_a_batch_of_edits_is_as_one_by_one(pipe, photo):
    images, texts = [photo, photo.transpose(Image.Transpose.ROTATE_90)], ["make it blue", "冬に"]
    together = edited(pipe, images, texts, 5, 6)
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        assert far(together[place : place + 1], edited(pipe, image, text, 5 + place)) < 1e-5
    assert far(together[:1], edited(pipe, images[1], texts[0], 5)) > 1e-3  # the picture counts
    assert far(together[:1], edited(pipe, images[0], texts[1], 5)) > 1e-3  # and the text does


def test_answers_labels_and_reconstructions(pipe, photo):
    answer = pipe.ask(photo, "what is it?", max_new_tokens=6)
    assert isinstance(answer, str)
    assert "".join(pipe.ask(photo, "what is it?", max_new_tokens=6, stream=True)) == answer
    ranking = pipe.classify(photo, ["a fox", "a cat"])
    assert {label for label, _ in ranking} == {"a fox", "a cat"}
    assert sum(chance for _, chance in ranking) == pytest.approx(1)
    (again,) = pipe.reconstruct(photo).images
    assert again.size == (448, 448) and np.asarray(again).std() > 10


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_folder_draws_the_same(pipe, tmp_path, form):
    other = load(write_unilip_folder(tmp_path / "other", **FORMS[form]))
    assert torch.equal(latents(other), latents(pipe))
    assert (other.model.lm_head is None) == FORMS[form].get("tied_head", False)
    ids = pipe.prompts.ids(pipe.prompts.question(PROMPTS[1]))
    assert other.prompts.ids(other.prompts.question(PROMPTS[1])) == ids


def test_weights_are_those_of_the_file(pipe, folder):
    state = pipe.model.state_dict()
    stored = load_file(folder / "model.safetensors")
    assert {own_name(name) for name in stored} == state.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[own_name(name)], tensor.float()), name


def test_half_precision(pipe, folder):
    moved, loaded = load(folder).to(torch.bfloat16), load(folder, dtype=torch.bfloat16)
    for half in (moved, loaded):
        state = half.model.state_dict()
        dtypes = {name.startswith("vae_decoder."): t.dtype for name, t in state.items()}
        assert dtypes == {False: torch.bfloat16, True: torch.float32}
    # Weights are stored in bfloat16, so both hold the file's bits.
    assert torch.equal(latents(moved), latents(loaded))
    # A seed means the same noise in every dtype.
    assert 1e-5 < far(latents(loaded), latents(pipe)) < 0.1


def test_stored_dtypes_and_what_has_no_use(pipe, tmp_path):
    """dtype="auto" keeps the file's bits, also through saving; training's tensors are left out."""
    extra = {"model.gen_vision_tower.layer.weight": (64, 64), "model.dcae.encoder.conv.bias": (32,)}
    folder = write_unilip_folder(
        tmp_path / "extra", extra_tensors=extra, decoder_dtype=torch.float32
    )
    first = load(folder, dtype="auto")
    stored = load_file(folder / "model.safetensors")
    first.save_pretrained(tmp_path / "saved")
    for kept in (first, load(tmp_path / "saved", dtype="auto")):
        state = kept.model.state_dict()
        assert len(state) == len(stored) - len(extra)
        for name in stored.keys() - extra.keys():
            assert state[own_name(name)].dtype == stored[name].dtype, name
            assert torch.equal(state[own_name(name)], stored[name]), name
    assert torch.equal(latents(load(folder)), latents(pipe))


def test_fast_tier(pipe, folder):
    exact = latents(pipe)
    for fast in (latents(pipe, tier="fast"), latents(load(folder, tier="fast"))):
        assert 1e-6 < far(fast, exact) < 0.2


def test_saving_and_loading_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["model_type"] == "clipflow_unilip"
    again = load(tmp_path / "saved")
    assert again.model.config == pipe.model.config
    state = again.model.state_dict()
    assert state.keys() == pipe.model.state_dict().keys()
    for name, tensor in pipe.model.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert torch.equal(latents(again), latents(pipe))
    prompt = pipe.prompts.question(PROMPTS[1])
    assert again.prompts.ids(prompt) == pipe.prompts.ids(prompt)


def write_odd_pictures(photo, folder):
    """Files in every mode that is easily read wrongly."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    photo.save(folder / "turned.jpg", exif=exif)
    clear = photo.copy()
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    clear.save(folder / "alpha.png")
    photo.quantize(16).save(folder / "palette.png")
    gray = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(folder / "deep.png")
    photo.convert("CMYK").save(folder / "print.jpg")
    return sorted(folder.iterdir())


def test_odd_pictures_are_seen_as_what_they_show(pipe, photo, tmp_path):
    paths = write_odd_pictures(photo, tmp_path)
    assert len(paths) == 5
    seen = pipe.reconstruct(paths, output_type="latent").images
    shown = [load_image(path) for path in paths]
    assert far(seen, pipe.reconstruct(shown, output_type="latent").images) < 1e-5
    assert {image.mode for image in shown} == {"RGB"}
    turned = shown[[path.name for path in paths].index("turned.jpg")]
    assert turned.size == (180, 300)
    plain = pipe.image_processor([photo.convert("L")])
    deep = pipe.image_processor([tmp_path / "deep.png"])
    assert (deep - plain).abs().max() < 1e-6
    ink = pipe.image_processor([tmp_path / "print.jpg"])
    assert (ink - pipe.image_processor([photo])).abs().mean() < 0.1


class TestCommands:
    @pytest.fixture
    def place(self, tmp_path, photo, monkeypatch):
        monkeypatch.chdir(tmp_path)
        photo.save("in.png")
        return tmp_path

    def run(self, folder, *arguments):
        assert main([*arguments, "--model", str(folder), "--device", "cpu"]) == 0

    def test_generate(self, folder, place, capsys):
        self.run(
            folder, "generate", *PROMPTS, "-o", "out", "--steps", "2", "--seed", "0",
            "--dtype", "bfloat16",
        )  # fmt: skip
        files = sorted((place / "out").iterdir())
        assert len(files) == 2 and Image.open(files[0]).size == (448, 448)
        assert f"seed 1  {PROMPTS[1]}" in capsys.readouterr().out

    def test_edit(self, folder, place):
        options = ["--steps", "2", "--seed", "0", "--tier", "fast"]
        self.run(folder, "edit", "in.png", "make it blue", "-o", "out.png", *options)
        assert Image.open("out.png").size == (448, 448)

    def test_ask_and_classify(self, folder, place, capsys):
        self.run(folder, "ask", "in.png", "what is it?", "--max-new-tokens", "4")
        assert capsys.readouterr().out.endswith("\n")
        self.run(folder, "classify", "in.png", "--labels", "a fox,a cat", "--json")
        ranking = json.loads(capsys.readouterr().out)
        assert sorted(label for label, _ in ranking) == ["a cat", "a fox"]

    def test_reconstruct(self, folder, place, capsys):
        self.run(folder, "reconstruct", "in.png", "-o", "again.png")
        assert Image.open("again.png").size == (448, 448)
        assert "PSNR" in capsys.readouterr().out

    def test_info(self, folder, pipe, capsys):
        assert main(["info", str(folder), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["total"] == sum(weight.numel() for weight in pipe.model.parameters())
        assert facts["parameters"]["lm_head"] == 320 * 64
