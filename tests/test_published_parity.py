"""The reference's recorded pictures, through the public pipeline on a folder of published form.

These are the tests that fail when an upgrade of diffusers or transformers changes any output: from
the folder's files to the picture, every value is held to what transformers 4.52.1 and diffusers
0.32.2 gave. CLIPFLOW_PARITY_DIR names another recording of the form of tests/fixtures/unilip_tiny.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from published_fixture import INSTRUCTION, PROMPT, RecordedPixels, write_recorded_folder
from unilip_fixture import SAMPLES, fixture_config, parity_dir, recorded_tensors

from clipflow import CLIPFlowPipeline
from clipflow.models.unilip.pixel_decoder import resize_pictures
from clipflow.models.unilip.published import SYSTEM_MESSAGE

TOLERANCE = 1e-4
LEVELS_OFF = 1e-3  # the part of pixels that may differ, by one level
STEPS, GUIDANCE = (4, 20), (1.0, 4.5)
TASKS = ("t2i", "edit")
BLANK = Image.new("RGB", (448, 448))  # the recorded pixels are seen instead


@pytest.fixture(scope="module")
def recorded():
    return recorded_tensors(parity_dir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_recorded_folder(tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def pipe(folder, recorded):
    return load(folder, recorded)


def load(folder, recorded):
    pipe = CLIPFlowPipeline.from_pretrained(folder)
    pixels = recorded["image.pixel_values"]
    pipe.image_processor = RecordedPixels(**vars(pipe.image_processor), pixel_values=pixels)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, task, noise, **options):
    if task == "t2i":
        return pipe(PROMPT, latents=noise, **options).images
    return pipe.edit(BLANK, INSTRUCTION, latents=noise, **options).images


def assert_close(actual, expected, name):
    """Within 1e-4 of the largest expected value."""
    assert actual.shape == expected.shape, name
    scale = max(1.0, expected.abs().max().item())
    error = (actual - expected).abs().max().item() / scale
    assert error <= TOLERANCE, f"{name}: largest difference {error:.2e}, allowed {TOLERANCE:.0e}"


def sampled(recorded, name, actual):
    if name in recorded:
        return actual, recorded[name]
    return actual[SAMPLES[name]], recorded[f"{name}.sample"]


def test_the_folder_is_of_the_published_form(folder, pipe):
    """Nothing but config.json of the published form and the weights says what the model is."""
    assert json.loads((folder / "config.json").read_text())["model_type"] == "unilip_internvl"
    recorded_config = fixture_config(parity_dir())
    for part in ("vision", "text", "dit", "decoder", "n_query", "unilip_factor", "flow_shift"):
        assert getattr(pipe.model.config, part) == getattr(recorded_config, part), part
    assert pipe.model.config.system_message == SYSTEM_MESSAGE


@pytest.mark.parametrize("task", TASKS)
def test_prompts_become_the_recorded_ids(pipe, recorded, task):
    write = pipe.prompts.text_to_image if task == "t2i" else pipe.prompts.edit
    text = PROMPT if task == "t2i" else INSTRUCTION
    ids, mask = pipe.prompts.rows([write(text), write(None)], torch.device("cpu"))
    assert torch.equal(mask, recorded[f"{task}_left.attention_mask"])
    assert torch.equal(ids * mask, recorded[f"{task}_left.input_ids"] * mask)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("task", TASKS)
def test_an_upgrade_of_diffusers_or_transformers_changes_no_latent(
    pipe, recorded, task, steps, guidance
):
    """The padding side of a recording means nothing: left and right ones are both met."""
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    latents = draw(pipe, task, recorded["noise"], output_type="latent", **options)
    names = [f"{task}_{side}.latent_{steps}steps_g{guidance}" for side in ("left", "right")]
    found = [name for name in names if name in recorded]
    assert names[0] in found and (len(found) == 2 or (steps, guidance) != (4, 4.5))
    for name in found:
        assert_close(latents, recorded[name], name)


@pytest.mark.parametrize("task", TASKS)
def test_an_upgrade_of_diffusers_or_transformers_changes_no_picture(pipe, recorded, task):
    """At the model's defaults: 20 steps, guidance 4.5, 448 px."""
    (picture,) = draw(pipe, task, recorded["noise"], output_type="np")
    assert picture.shape == (448, 448, 3)
    crop = recorded[f"{task}_left.image_448_hwc_float_crop96"]
    assert_close(torch.from_numpy(picture[176:272, 176:272]), crop, "float picture")

    (levels,) = draw(pipe, task, recorded["noise"])
    assert levels.size == (448, 448)
    name = f"{task}_left.image_448_hwc_uint8_20steps_g4.5"
    levels, wanted = sampled(recorded, name, torch.from_numpy(np.array(levels)))
    difference = (levels.int() - wanted.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < LEVELS_OFF


@torch.no_grad()
def test_an_upgrade_of_diffusers_or_transformers_changes_no_reconstruction(pipe, recorded):
    latents = pipe.reconstruct(BLANK, output_type="latent").images
    latents = latents / pipe.model.config.unilip_factor
    assert_close(latents, recorded["tokenizer.latent"], "latent")
    decoded = pipe.model.decode(latents)
    assert_close(*sampled(recorded, "tokenizer.decoded_512", decoded), "decoded")

    # Recorded before colors are brought into range; the pipeline's picture is compared where
    # nothing is out of it.
    wanted = recorded["tokenizer.decoded_448_bilinear_crop64"] / 2 + 0.5
    outside = resize_pictures((decoded.abs() > 1).any(1, keepdim=True).float(), 448)
    inside = (outside[..., 192:256, 192:256] == 0).expand_as(wanted)
    assert inside.float().mean() > 0.3
    picture = pipe.reconstruct(BLANK, output_type="pt").images[..., 192:256, 192:256]
    assert_close(picture[inside], wanted[inside], "picture")


@torch.no_grad()
def test_an_upgrade_of_diffusers_or_transformers_changes_no_answer(pipe, recorded):
    """The recorded question has its image last, so its ids go to the folder's model themselves."""
    ids = recorded["und.input_ids"]
    features = pipe.model.encode_image(recorded["image.pixel_values"])
    assert_close(features, recorded["vision.projected"], "features")
    logits = pipe.model.logits(ids, torch.ones_like(ids), features)
    assert_close(logits[:, -1:], recorded["und.logits_last"], "logits")


@torch.no_grad()
def test_the_position_table_is_on_whatever_diffusers_does(pipe, recorded, tmp_path):
    """Without it, as diffusers from 0.33 on would run these weights, the velocity is another."""
    dit = pipe.model.dit
    assert pipe.model.config.dit.position_table
    side = pipe.model.config.latent_side
    assert_close(dit.position_table(side, side)[None], recorded["dit.pos_embed"], "table")
    off = load(write_recorded_folder(tmp_path, dit_interpolation_scale=0), recorded)
    assert not off.model.config.dit.position_table

    ids, mask = (recorded[f"t2i_left.{name}"] for name in ("input_ids", "attention_mask"))
    hidden, real = pipe.model.encode_condition(ids, mask)
    rows = (recorded["noise"].expand(2, -1, -1, -1), torch.tensor([500, 500]))
    velocity, without = (
        part.model.dit(*rows, hidden.flip(0), real.flip(0)) for part in (pipe, off)
    )
    expected = recorded["t2i_left.velocity_t500"]
    assert_close(velocity, expected, "velocity")
    assert ((without - expected).norm() / expected.norm()).item() > 0.1
