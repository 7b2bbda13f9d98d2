"""The decoder that draws CLIP features at once: its pictures, folders, options and bad input."""

import json

import pytest
import tiny_dc_ae as tiny
import torch
from tiny_sdxl import tiny_decoder

from clipflow.errors import InputError, ShapeError
from clipflow.models.blip3o.decoders import load_decoder
from clipflow.models.blip3o.feature_decoder import FeatureDecoder, FeatureDecoderConfig
from clipflow.models.blip3o.sdxl_decoder import SDXLDecoder
from clipflow.models.dc_ae.config import DecoderConfig

CONFIG = FeatureDecoderConfig(
    feature_width=6,
    grid_side=4,
    decoder=DecoderConfig(
        latent_channels=4,
        attention_head_dim=4,
        block_types=("ResBlock", "EfficientViTBlock"),
        block_out_channels=(4, 8),
        layers_per_block=(1, 1),
        qkv_multiscales=((), ()),
    ),
)


@pytest.fixture(scope="module")
def decoder():
    return tiny.randomized(FeatureDecoder(CONFIG))


@torch.no_grad()
def test_it_is_a_projection_and_the_decoder(decoder):
    grid = torch.randn(2, 6, 3, 5)
    latents = torch.einsum("bdhw,cd->bchw", grid, decoder.proj.weight)
    expected = decoder.decode(latents + decoder.proj.bias[:, None, None])
    pictures = decoder.draw(grid)
    assert pictures.shape == (2, 3, 6, 10)
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_forms_of_features(decoder):
    grid = torch.randn(2, 6, 4, 4)
    expected = decoder.draw(grid)
    assert expected.shape[-1] == decoder.native_size == 8
    assert torch.equal(decoder.draw(grid.flatten(2).transpose(1, 2)), expected)
    assert torch.equal(decoder(grid.double()), expected)
    assert torch.equal(decoder.draw(grid, torch.zeros(16, 6), height=8, width=8), expected)


def test_every_parameter_learns():
    decoder = FeatureDecoder(CONFIG)
    decoder(torch.randn(2, 6, 4, 4)).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("features", "options", "error", "message"),
    [
        (torch.ones(1, 5, 4, 4), {}, ShapeError, r"\[B, 6, h, w\] or \[B, side \* side, 6\], got"),
        (torch.ones(1, 15, 6), {}, ShapeError, r"got \[1, 15, 6\]"),
        (torch.ones(16, 6), {}, ShapeError, r"got \[16, 6\]"),
        (
            torch.ones(1, 16, 6),
            {"num_inference_steps": 50},
            InputError,
            "num_inference_steps: th",
        ),
        (torch.ones(1, 16, 6), {"guidance_scale": 3.0}, InputError, "guidance_scale: this model's"),
        (torch.ones(1, 16, 6), {"latents": torch.ones(1)}, InputError, "latents: this model's dec"),
        (torch.ones(1, 16, 6), {"height": 16}, InputError, "height must be 8 for these features"),
    ],
)
def test_bad_input(decoder, features, options, error, message):
    with pytest.raises(error, match=message):
        decoder.draw(features, **options)


def test_a_folder_goes_and_comes(decoder, tmp_path):
    decoder.save(tmp_path / "decoder")
    read = load_decoder(tmp_path / "decoder", dtype=torch.bfloat16)
    assert isinstance(read, FeatureDecoder) and not read.training
    assert read.sizes == CONFIG
    assert read.dtype == torch.float32  # half precision shows in pictures
    features = torch.randn(1, 16, 6)
    with torch.no_grad():
        assert torch.equal(read.draw(features), decoder.draw(features))


def test_the_folder_says_which_decoder_it_holds(tmp_path):
    tiny_decoder().save(tmp_path / "sdxl")
    assert isinstance(load_decoder(tmp_path / "sdxl"), SDXLDecoder)
    (tmp_path / "sdxl/config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="must have the model_type 'clipflow_feature_decoder'"):
        load_decoder(tmp_path / "sdxl")
    with pytest.raises(FileNotFoundError, match="the decoder must be a folder"):
        load_decoder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_side": 0}, "grid_side must be above 0"),
        ({"feature_width": "6"}, "feature_width must be int"),
        ({"width": 3}, r"unknown keys \['width'\]"),
        ({"model_type": "x"}, "model_type must be 'clipflow_feature_decoder', got 'x'"),
    ],
)
def test_senseless_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        FeatureDecoderConfig.from_dict({**CONFIG.to_dict(), **changes})


def test_a_stage_that_repeats_no_whole_latents():
    values = CONFIG.to_dict()
    values["decoder"]["block_out_channels"] = [4, 6]
    with pytest.raises(ValueError, match="smallest stage must be a multiple of 4 wide"):
        FeatureDecoderConfig.from_dict(values)
