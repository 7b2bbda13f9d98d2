"""Reconstruction at other sizes, against the recorded tensors and against its plain definition."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import tiny_pipeline
from torch.nn import functional as F
from unilip_fixture import load_fixture

from clipflow import CLIPFlowPipeline
from clipflow.cli import main
from clipflow.errors import InputError, NotEnoughMemory
from clipflow.models.unilip.pixel_decoder import resize_pictures
from clipflow.pipelines.image_processor import ImageProcessor
from clipflow.pipelines.reconstruction import Canvas
from clipflow.sampling import memory


@pytest.fixture(scope="module")
def unilip() -> CLIPFlowPipeline:
    """The fixture's model; reconstruction needs no tokenizer of texts but the constructor does."""
    model = load_fixture().model
    return CLIPFlowPipeline(model, tiny_pipeline().tokenizer)


@pytest.fixture
def small() -> CLIPFlowPipeline:
    return tiny_pipeline()


def noise_picture(side: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def unclamped(decoded: torch.Tensor) -> torch.Tensor:
    return (decoded / 2 + 0.5).clamp(0, 1)


class TestAgainstTheRecordedTensors:
    """`image_processor` is by-passed: what was recorded begins with pixel values."""

    @pytest.mark.parametrize(
        ("side", "name", "latent"),
        [(448, "image.pixel_values", "tokenizer.latent"),
         (224, "image224.pixel_values", "tokenizer224.latent")],
    )  # fmt: skip
    def test_latents(self, unilip, monkeypatch, side, name, latent):
        recorded = load_fixture().tensors
        monkeypatch.setattr(ImageProcessor, "__call__", lambda self, images: recorded[name])
        found = unilip.reconstruct("unread.png", resolution=side, output_type="latent").images
        wanted = recorded[latent] * unilip.model.config.unilip_factor
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-4)

    @torch.no_grad()
    def test_pictures(self, unilip, monkeypatch):
        recorded = load_fixture().tensors
        pixels = recorded["image.pixel_values"]
        monkeypatch.setattr(ImageProcessor, "__call__", lambda self, images: pixels)
        drawn = unilip.reconstruct("unread.png", resolution=448, output_type="pt").images
        assert drawn.shape == (1, 3, 448, 448)
        crop = recorded["tokenizer.decoded_448_bilinear_crop64"]
        here = drawn[..., 192:256, 192:256]
        decoded = unilip.model.decode(recorded["tokenizer.latent"])
        assert (crop.abs() < 1).float().mean() > 0.3
        calm = resize_pictures((decoded.abs() < 1).float(), 448)[..., 192:256, 192:256] == 1
        torch.testing.assert_close(here[calm], unclamped(crop)[calm], rtol=0, atol=2e-5)

    @torch.no_grad()
    def test_the_way_back_from_a_padded_canvas(self, unilip):
        """With margins of 12 the recorded crop [100, 164) of 280 begins at 88."""
        recorded = load_fixture().tensors
        canvas = Canvas.of(256, unilip.model.config)
        assert (canvas.seen, canvas.margins, canvas.shown) == (280, (12, 12), 256)
        decoded = unilip.model.decode(recorded["tokenizer.latent"])
        found = canvas.pictures(decoded, "pt")
        assert found.shape == (1, 3, 256, 256)
        wanted = unclamped(recorded["tokenizer.decoded_280_aligncorners_crop64"])
        torch.testing.assert_close(found[..., 88:152, 88:152], wanted, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", [256, 197])
def test_padded_sizes_are_their_definition(unilip, side):
    """Section 1d in plain PyTorch: pad what has levels in [0, 1], see, draw, resize, cut."""
    config, model = unilip.model.config, unilip.model
    picture = noise_picture(side)
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    seen = -(-side // 28) * 28
    top = (seen - side) // 2
    levels = F.pad(levels, (top, seen - side - top) * 2, mode="reflect")
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    latents = model.clip_down(model.encode_image((levels - mean) / std))
    assert latents.shape[-1] == seen // 28
    decoded = model.decode(latents)
    assert decoded.shape[-1] == seen // 28 * 32
    back = F.interpolate(decoded, (seen, seen), mode="bilinear", align_corners=True)
    wanted = unclamped(back[..., top : top + side, top : top + side])
    found = unilip.reconstruct(picture, resolution=side, output_type="pt").images
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    scaled = unilip.reconstruct(picture, resolution=side, output_type="latent").images
    torch.testing.assert_close(scaled, latents * config.unilip_factor, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_models_own_size_is_what_it_was(small):
    """Bit for bit: features, compressed, scaled and unscaled, drawn, clamped, resized."""
    picture = noise_picture(90)
    pixels = small.image_processor([picture])
    features = small.model.encode_image(pixels)
    factor = small.model.config.unilip_factor
    decoded = small.model.decode(small.model.clip_down(features) * factor / factor)
    wanted = resize_pictures(unclamped(decoded), 56)
    for resolution in (None, 64):
        found = small.reconstruct(picture, resolution=resolution, output_type="pt").images
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("resolution", "grid", "shown"), [(None, 8, 56), (32, 4, 28), (96, 12, 84), (50, 7, 44)]
)
def test_shapes_of_a_model_that_shows_less_than_it_sees(small, resolution, grid, shown):
    pictures = [noise_picture(40), noise_picture(70, seed=1)]
    found = small.reconstruct(pictures, resolution=resolution, output_type="np").images
    assert found.shape == (2, shown, shown, 3) and np.isfinite(found).all()
    latents = small.reconstruct(pictures, resolution=resolution, output_type="latent").images
    assert latents.shape == (2, 16, grid, grid)
    (first, _) = small.reconstruct(pictures, resolution=resolution, return_dict=False)[0]
    assert first.size == (shown, shown)


def test_every_size_up_to_three_features_works(small):
    for side in (4, 5, 7, 8, 9, 15, 16, 17, 23):
        found = small.reconstruct(noise_picture(30), resolution=side, output_type="pt").images
        assert found.shape[-1] == round(side * 56 / 64) and torch.isfinite(found).all()


@pytest.mark.parametrize(("step", "least"), [(28, 10), (8, 4), (3, 2), (1, 1)])
def test_the_least_size_is_what_reflection_can_pad(small, step, least):
    config = small.model.config
    vision = dataclasses.replace(config.vision, patch_size=step, shuffle=1, image_size=step * 4)
    config = dataclasses.replace(config, vision=vision)
    for side in range(1, 2 * step + 1):
        if side >= least:
            canvas = Canvas.of(side, config)
            assert max(canvas.margins) < side and sum(canvas.margins) == canvas.seen - side
        else:
            with pytest.raises(InputError, match=f"at least {least} pixels, got {side}"):
                Canvas.of(side, config)


@pytest.mark.parametrize("resolution", [0, -8, 2.5, "64", True])
def test_no_number_of_pixels(small, resolution):
    with pytest.raises(InputError, match="resolution must be a whole number"):
        small.reconstruct(noise_picture(8), resolution=resolution)


def test_absurd_sizes_are_refused_before_anything_is_made(small, monkeypatch):
    with pytest.raises(NotEnoughMemory, match="1000000 x 1000000 pixels needs"):
        small.reconstruct(noise_picture(8), resolution=10**6)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10_000_000)
    with pytest.raises(NotEnoughMemory, match="2 pictures of 640 x 640"):
        small.reconstruct([noise_picture(8)] * 2, resolution=640)


def test_the_command(tmp_path, small, capsys):
    small.save_pretrained(tmp_path / "model")
    noise_picture(64).save(tmp_path / "in.png")
    call = ["reconstruct", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")]
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    assert main([*call, *model, "--resolution", "48"]) == 0
    assert Image.open(tmp_path / "out.png").size == (42, 42)
    printed = capsys.readouterr().out
    assert "PSNR" in printed and "SSIM" in printed
    (tmp_path / "out.png").unlink()
    for value, message in [("3", "from 7 to 1000000"), ("many", "from 7"), ("100000", "needs")]:
        assert main([*call, *model, "--resolution", value]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
