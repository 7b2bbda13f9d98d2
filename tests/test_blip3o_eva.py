"""EVA-CLIP's tower: the reference's recorded outputs, its published sizes, training, bad input."""

import json
import math

import pytest
import torch
from recordings import recording
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from clipflow.errors import ShapeError
from clipflow.models.blip3o.eva import EVAConfig, EVATower, pooled_grid
from clipflow.models.blip3o.eva_keys import PREFIXES, eva_config, eva_names, load_eva

TOLERANCE = 1e-5
TINY = EVAConfig(
    image_size=8,
    patch_size=2,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    pool=2,
)


@pytest.fixture(scope="module")
def recorded():
    folder = recording("blip3o_tiny")
    return load_file(folder / "eva_model.safetensors"), load_file(folder / "eva_io.safetensors")


@pytest.fixture(scope="module")
def recorded_tower(recorded):
    values = json.loads((recording("blip3o_tiny") / "eva_config.json").read_text())
    config = EVAConfig(
        image_size=values["img_size"],
        patch_size=values["patch_size"],
        hidden_size=values["embed_dim"],
        num_hidden_layers=values["depth"],
        num_attention_heads=values["num_heads"],
        intermediate_size=int(values["embed_dim"] * values["mlp_ratio"]),
        layer_norm_eps=values["norm_eps"],
    )
    tower = EVATower(config)
    tower.load_state_dict(recorded[0])
    return tower.eval()


@torch.no_grad()
def test_features_and_target_of_the_reference(recorded_tower, recorded):
    tensors = recorded[1]
    features = recorded_tower(tensors["in.pixels"])
    torch.testing.assert_close(features, tensors["out.patch_features"], atol=TOLERANCE, rtol=0)
    target = recorded_tower.target(tensors["in.pixels"])
    torch.testing.assert_close(target, tensors["out.pooled_target"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_float64_of_the_reference(recorded_tower, recorded):
    """In float64 nothing but the recording's own rounding is left, and in float32 no more."""
    pixels, expected = recorded[1]["in.pixels"], recorded[1]["out.patch_features"]
    wide = EVATower(recorded_tower.config).double()
    wide.load_state_dict(recorded[0])
    exact = wide(pixels.double())
    theirs = (expected.double() - exact).abs().max()
    ours = (recorded_tower(pixels).double() - exact).abs().max()
    assert ours <= 2 * theirs


def test_pooling_is_the_average_and_nothing_else():
    features = torch.randn(2, 36, 5)
    grid = features.transpose(1, 2).unflatten(2, (6, 6))
    torch.testing.assert_close(pooled_grid(features, 3), F.avg_pool2d(grid, 3))
    assert torch.equal(pooled_grid(features, 1), grid)
    with pytest.raises(ShapeError, match="multiple of pool 4"):
        pooled_grid(features, 4)


def test_published_sizes():
    """EVA-CLIP-E/14-plus: specs section A.6."""
    with torch.device("meta"):
        tower = EVATower(EVAConfig())
    state = tower.state_dict()
    assert len(state) == 772
    assert sum(tensor.numel() for tensor in state.values()) == 4_350_208_256
    assert eva_config({own: tuple(tensor.shape) for own, tensor in state.items()}) == EVAConfig()
    assert state["pos_embed"].shape == (1, 1025, 1792)
    assert state["blocks.63.attn.qkv.weight"].shape == (3 * 1792, 1792)
    pixels = torch.empty(3, 3, 448, 448, device="meta")
    assert tower(pixels).shape == (3, 1024, 1792)
    assert tower.target(pixels).shape == (3, 1792, 8, 8)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_in_published_files(recorded, prefix):
    """Among others: of a text tower, of what follows the blocks, of Qwen2.5-VL's vision."""
    state = {own: tuple(tensor.shape) for own, tensor in recorded[0].items()}
    others = ["text.blocks.0.norm1.weight", f"{prefix}norm.weight", f"{prefix}head.weight"]
    if "gen_vision_tower" in prefix:
        others += ["visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight"]
    names = eva_names([*(prefix + own for own in state), *others])
    assert names == {own: prefix + own for own in state}
    found = eva_config(state)
    assert (found.image_size, found.patch_size, found.pool) == (112, 14, 4)
    tower = EVATower(found)
    assert {own: tuple(tensor.shape) for own, tensor in tower.state_dict().items()} == state


@torch.no_grad()
def test_the_tower_in_a_folder(recorded, recorded_tower, tmp_path):
    state = {f"visual.{own}": tensor for own, tensor in recorded[0].items()}
    others = {"visual.norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    save_file({**state, **others}, tmp_path / "model.safetensors")
    pixels = recorded[1]["in.pixels"]
    assert torch.equal(load_eva(tmp_path)(pixels), recorded_tower(pixels))
    assert load_eva(tmp_path, pool=2).target(pixels[:1]).shape == (1, 32, 4, 4)
    assert load_eva(tmp_path, dtype=torch.bfloat16).pos_embed.dtype == torch.bfloat16
    save_file({**state, "visual.pos_embed": torch.ones(1, 66, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"pos_embed: must have shape \[1, 65, 32\], got"):
        load_eva(tmp_path)
    save_file(others, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must hold an EVA-CLIP tower, got no cls_token"):
        load_eva(tmp_path)


def test_files_without_a_tower():
    names = ["visual.blocks.0.attn.qkv.weight", "model.norm.weight"]
    assert eva_names(names) == {}
    with pytest.raises(ValueError, match=r"EVA tower: patch_embed.proj.weight must have 4 dim"):
        eva_config({})
    with pytest.raises(ValueError, match=r"width must be one of \[32, 1792\], got 7"):
        eva_config({"patch_embed.proj.weight": (7, 3, 14, 14)})


def test_every_parameter_learns():
    tower = EVATower(TINY)
    target = tower.target(torch.randn(3, 3, 8, 8))
    assert target.shape == (3, 8, 2, 2)
    (target * torch.randn_like(target)).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix():
    tower, pixels = EVATower(TINY), torch.randn(3, 3, 8, 8)
    for row, alone in zip(tower(pixels), pixels, strict=True):
        torch.testing.assert_close(row, tower(alone[None])[0])


def test_other_sizes_are_refused():
    tower = EVATower(TINY)
    for shape in ([3, 8, 8], [1, 3, 8, 10], [1, 4, 8, 8], [1, 3, 16, 16]):
        with pytest.raises(ShapeError, match=r"pixel_values must be \[B, 3, 8, 8\], got"):
            tower(torch.zeros(shape))


def test_config_goes_to_json_and_back():
    values = json.loads(json.dumps(TINY.to_dict()))
    assert EVAConfig.from_dict(values) == TINY
    assert (TINY.grid_side, TINY.target_side) == (4, 2)
    with pytest.raises(ValueError, match=r"eva config: unknown keys \['width'\]"):
        EVAConfig.from_dict({**values, "width": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 450}, "image_size must be a multiple of 56, got 450"),
        ({"num_attention_heads": 15}, "hidden_size must be a multiple of 15, got 1792"),
        ({"pool": 0, "patch_size": -1}, "patch_size .* got -1; pool must be above 0"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps must be above 0 and finite, got nan"),
    ],
)
def test_senseless_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        EVAConfig(**changes)
