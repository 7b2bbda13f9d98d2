"""The SDXL decoder: the loop that the reference recorded, and a plain restatement of it.

CLIPFLOW_PARITY_DIR names recordings with the networks' weights, with which pictures are drawn.
"""

import json

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from recordings import recording
from safetensors.torch import load_file
from tiny_sdxl import UNET, VAE, tiny_decoder

from clipflow.errors import InputError, NotEnoughMemory, SamplingError, ShapeError
from clipflow.models.blip3o.sdxl_decoder import SDXLDecoder
from clipflow.pipelines.image_processor import postprocess
from clipflow.sampling import memory

STEPS = 4
CASES = {"cfg3": 3.0, "cfg1": 1.0}


@pytest.fixture(scope="module")
def recorded():
    return load_file(recording("blip3o_sdxl_tiny") / "io.safetensors")


@pytest.fixture(scope="module")
def recorded_decoder():
    """The recording's sizes; its weights where they are there, else zero."""
    folder = recording("blip3o_sdxl_tiny")
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**config["unet"]), AutoencoderKL(**config["vae"])
    decoder = SDXLDecoder(unet, vae, config["scheduler"]).to_empty(device="cpu").eval()
    for parameter in decoder.parameters():
        torch.nn.init.zeros_(parameter)
    if (folder / "model.safetensors").exists():
        decoder.load_state_dict(load_file(folder / "model.safetensors"))
    return decoder


def draw(decoder, recorded, guidance):
    return decoder.draw(
        recorded["in.features"],
        recorded["in.null_features"],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=64,
        width=64,
        latents=recorded["in.noise"],
    )


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_loop(recorded, recorded_decoder, monkeypatch, case):
    """With what its networks gave: theirs is every input of ours, and so every picture."""
    calls = []

    def unet(rows, timestep, hidden, added_cond_kwargs, return_dict):
        step = f"{case}.step{len(calls)}"
        calls.append(step)
        torch.testing.assert_close(rows, recorded[f"{step}.unet_in"], atol=1e-6, rtol=1e-6)
        assert timestep.item() == recorded[f"{step}.t"].item()
        wanted = [recorded["in.features"], recorded["in.null_features"]][: len(rows)]
        assert torch.equal(hidden, torch.cat(wanted))
        torch.testing.assert_close(
            added_cond_kwargs["text_embeds"], recorded[f"{case}.text_embeds"], atol=1e-7, rtol=0
        )
        ids = added_cond_kwargs["time_ids"]
        assert ids.shape == (len(rows), 6)
        assert torch.equal(ids.flatten(), recorded[f"{case}.time_ids"])
        return (recorded[f"{step}.unet_out"],)

    def vae(latents, return_dict):
        torch.testing.assert_close(latents, recorded[f"{case}.vae_in"], atol=2e-6, rtol=1e-6)
        return (recorded[f"{case}.vae_out"],)

    monkeypatch.setattr(recorded_decoder.unet, "forward", unet)
    monkeypatch.setattr(recorded_decoder.vae, "decode", vae)
    pictures = draw(recorded_decoder, recorded, CASES[case])
    assert len(calls) == STEPS
    assert torch.equal(pictures, recorded[f"{case}.vae_out"])
    levels = torch.from_numpy(postprocess(pictures, None, "np") * 255).round().byte()[0]
    assert torch.equal(levels, recorded[f"{case}.image_uint8"])


def test_the_recorded_schedule(recorded, recorded_decoder):
    scheduler = recorded_decoder._schedule(STEPS)
    assert torch.equal(scheduler.sigmas, recorded["cfg3.sigmas"])
    assert scheduler.init_noise_sigma == recorded["cfg3.init_noise_sigma"]


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_pictures(recorded, recorded_decoder, case):
    if not (recording("blip3o_sdxl_tiny") / "model.safetensors").exists():
        pytest.skip("CLIPFLOW_PARITY_DIR names no recording with weights")
    pictures = draw(recorded_decoder, recorded, CASES[case])
    torch.testing.assert_close(pictures, recorded[f"{case}.vae_out"], atol=2e-5, rtol=0)
    levels = torch.from_numpy(postprocess(pictures, None, "np") * 255).round()[0]
    difference = (levels - recorded[f"{case}.image_uint8"]).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


@torch.no_grad()
def plain(decoder, cond, null, noise, steps, guidance, sides):
    """The loop as one writes it down, of one picture."""
    scheduler = EulerDiscreteScheduler(**decoder.scheduler)
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    ids = torch.tensor([[*sides, 0.0, 0.0, *sides]])
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        both = [
            decoder.unet(
                scaled,
                timestep,
                hidden,
                added_cond_kwargs={"text_embeds": hidden.mean(1), "time_ids": ids},
            ).sample
            for hidden in (cond, null)
        ]
        noise = both[1] + guidance * (both[0] - both[1]) if guidance > 1 else both[0]
        x = scheduler.step(noise, timestep, x).prev_sample
    return decoder.vae.decode(x / decoder.vae.config.scaling_factor).sample


SCHEDULES = {
    "as SDXL": None,
    "v": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "Karras": {"use_karras_sigmas": True},
}


@pytest.mark.parametrize("guidance", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_pictures_of_a_plain_loop(name, guidance):
    """Of several sizes and rows; in a batch as alone."""
    decoder = tiny_decoder(SCHEDULES[name])
    cond, null = torch.randn(2, 9, 6), torch.randn(2, 9, 6)
    noise = torch.randn(2, 4, 6, 4)
    options = {"num_inference_steps": 3, "guidance_scale": guidance, "height": 12, "width": 8}
    pictures = decoder.draw(cond, null, latents=noise, **options)
    assert pictures.shape == (2, 3, 12, 8)
    for row in range(2):
        one = slice(row, row + 1)
        expected = plain(decoder, cond[one], null[one], noise[one], 3, guidance, [12.0, 8.0])
        torch.testing.assert_close(pictures[one], expected, atol=1e-5, rtol=1e-5)


def small(decoder, features, null=None, **options):
    """4 steps of 8 x 8 pixels."""
    options = {"num_inference_steps": 4, "height": 8, "width": 8, **options}
    return decoder.draw(features, null, **options)


def test_generators_make_pictures_independent():
    decoder, features, null = tiny_decoder(), torch.randn(3, 4, 6), torch.randn(4, 6)

    def dice(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = small(decoder, features, null, generator=dice(1, 2, 1))
    for row, seed in enumerate((1, 2, 1)):
        alone = small(decoder, features[row : row + 1], null, generator=dice(seed)[0])
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)
    torch.manual_seed(7)
    once = small(decoder, features, null)
    torch.manual_seed(7)
    noise = torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(small(decoder, features, null, latents=noise), once)


def test_forms_of_features():
    """Grids are read row by row; one null serves all pictures."""
    decoder = tiny_decoder()
    grid, null = torch.randn(2, 6, 2, 3), torch.randn(6, 6)
    noise = torch.randn(2, 4, 4, 4)
    expected = small(decoder, grid, null, latents=noise)
    tokens = grid.permute(0, 2, 3, 1).reshape(2, 6, 6)
    for form in (null, null[None], null.expand(2, -1, -1), null.t().reshape(1, 6, 2, 3)):
        assert torch.equal(small(decoder, tokens, form, latents=noise), expected)
    wide = small(decoder, tokens.double(), null.double(), latents=noise)
    assert torch.equal(wide, expected)


def test_progress_and_half_precision():
    decoder, done = tiny_decoder(dtype=torch.bfloat16), []
    pictures = small(decoder, torch.randn(1, 4, 6), torch.zeros(4, 6), progress=done.append)
    assert pictures.dtype == decoder.dtype == torch.bfloat16
    assert done == [1] * 4
    torch.manual_seed(3)
    noise = torch.randn(1, 4, 4, 4, dtype=torch.bfloat16)  # drawn in the decoder's dtype
    torch.manual_seed(3)
    drawn = small(decoder, torch.ones(1, 4, 6), guidance_scale=1.0)
    given = small(decoder, torch.ones(1, 4, 6), guidance_scale=1.0, latents=noise)
    assert torch.equal(drawn, given)


def test_native_size():
    """4 latent cells of 2 pixels; calling the module draws."""
    decoder, noise = tiny_decoder(), torch.randn(1, 4, 4, 4)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "latents": noise}
    pictures = decoder(torch.ones(1, 4, 6), **options)
    assert pictures.shape == (1, 3, 8, 8)
    assert torch.equal(pictures, small(decoder, torch.ones(1, 4, 6), **options))
    assert (decoder.native_size, decoder.upscale, decoder.feature_width) == (8, 2, 6)


def test_tiles_draw_nearly_the_same():
    decoder = tiny_decoder()
    options = {"latents": torch.randn(1, 4, 8, 8), "height": 16, "width": 16, "guidance_scale": 1}
    features = torch.randn(1, 4, 6)
    whole = small(decoder, features, **options)
    decoder.tiling = True
    tiled = small(decoder, features, **options)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    decoder.tiling = False
    assert torch.equal(small(decoder, features, **options), whole)


def test_memory_is_asked_for_first(monkeypatch):
    decoder, features, null = tiny_decoder(), torch.ones(3, 4, 6), torch.zeros(4, 6)
    needed = decoder.activation_bytes(3, 8, 8)
    assert needed > decoder.activation_bytes(3, 8, 8, guided=False)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    small(decoder, features, null)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(NotEnoughMemory, match="drawing 3 pictures of 8 x 8 pixels needs"):
        small(decoder, features, null)


FEATURES, NULL = torch.ones(2, 4, 6), torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("features", "null", "options", "error", "message"),
    [
        (torch.ones(2, 4, 5), NULL, {}, ShapeError, r"features must be \[B, N, 6\] or \[B, 6, h"),
        (torch.ones(4, 6), NULL, {}, ShapeError, r"h, w\], got \[4, 6\]"),
        (torch.ones(0, 4, 6), NULL, {}, ShapeError, r"got \[0, 4, 6\]"),
        (FEATURES, None, {}, InputError, "null_features must be given with a guidance_scale above"),
        (FEATURES, torch.ones(3, 6), {}, ShapeError, r"\[4, 6\] or \[2, 4, 6\] .* got \[3, 6\]"),
        (FEATURES, torch.ones(3, 4, 6), {}, ShapeError, r"got \[3, 4, 6\]"),
        (FEATURES, NULL, {"num_inference_steps": 0}, InputError, "from 1 to 1000, got 0"),
        (FEATURES, NULL, {"num_inference_steps": 2.0}, InputError, "got 2.0"),
        (FEATURES, NULL, {"guidance_scale": float("nan")}, InputError, "finite number, got nan"),
        (FEATURES, NULL, {"height": 7}, InputError, "height must be a multiple of 2, got 7"),
        (FEATURES, NULL, {"width": -8}, InputError, "width must be a multiple of 2, got -8"),
        (FEATURES, NULL, {"latents": torch.ones(2, 4, 3, 4)}, ShapeError, r"\[2, 4, 4, 4\], got"),
        (FEATURES, NULL, {"generator": [torch.Generator()]}, InputError, "or 2 as pictures, got 1"),
        (FEATURES, NULL, {"generator": 3}, InputError, "a torch.Generator, got int"),
        (FEATURES * float("nan"), NULL, {}, SamplingError, "pictures that are not finite"),
    ],
)
def test_bad_input(features, null, options, error, message):
    with pytest.raises(error, match=message):
        small(tiny_decoder(), features, null, **options)


def test_parts_that_do_not_fit():
    decoder = tiny_decoder()
    with pytest.raises(ValueError, match=r"prediction_type of epsilon, .* got 'flow'"):
        SDXLDecoder(decoder.unet, AutoencoderKL(**VAE), {"prediction_type": "flow"})
    with pytest.raises(ValueError, match="vae must have latent_channels 4 as the UNet, got 3"):
        SDXLDecoder(decoder.unet, AutoencoderKL(**{**VAE, "latent_channels": 3}))
    other = UNet2DConditionModel(**{**UNET, "addition_embed_type": None})
    with pytest.raises(ValueError, match="unet must have addition_embed_type 'text_time', got Non"):
        SDXLDecoder(other, AutoencoderKL(**VAE))
