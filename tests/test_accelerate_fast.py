"""The fast tier of `clipflow.accelerate`: int8 layers, which step back where they would not do."""

import copy

import pytest
import torch

import clipflow
from clipflow import Acceleration, AccelerationError
from tests import tiny_diffusers as tiny

MODELS = {
    "sana": (tiny.sana, tiny.sana_call, 10 * 3),
    "lumina2": (tiny.lumina2, tiny.lumina2_call, 7 * 4),
    "lumina-next": (tiny.lumina_next, tiny.lumina_next_call, 10 * 2),
}
every_model = pytest.mark.parametrize("make, call, layers", MODELS.values(), ids=MODELS)


def fast(make=tiny.sana):
    stock = make()
    model = copy.deepcopy(stock)
    return stock, model, clipflow.accelerate(model, tier="fast")


def distance(got, expected):
    return float((got[0] - expected[0]).norm() / expected[0].norm())


@every_model
@torch.no_grad()
def test_close_to_stock_and_undone(make, call, layers):
    stock, model, report = fast(make)
    assert 1e-4 < distance(model(**call()), stock(**call())) < 0.1
    int8 = [line for line in report.explain().splitlines() if line.endswith("int8")]
    assert len([line for line in int8 if not line.startswith(" ")]) == layers
    assert report.tier == "fast"
    report.undo()
    assert torch.equal(model(**call())[0], stock(**call())[0])
    assert not any("forward" in part.__dict__ for part in model.modules())


def test_layers_around_the_blocks_stay_in_float():
    _, model, _ = fast()
    for name in ("proj_out", "caption_projection.linear_1", "time_embed.linear"):
        assert "forward" not in model.get_submodule(name).__dict__
    assert "forward" not in model.patch_embed.proj.__dict__
    assert list(model.state_dict()) == list(tiny.sana().state_dict())


def test_training_runs_in_float():
    stock, model, _ = fast()
    for each in (stock, model):
        each(**tiny.sana_call())[0].square().mean().backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm() + 1e-8


@torch.no_grad()
def test_a_changed_weight_is_never_stale():
    stock, model, _ = fast()
    state = {name: tensor * 1.5 for name, tensor in stock.state_dict().items()}
    before = model(**tiny.sana_call())[0]
    for each in (stock, model):
        each.load_state_dict(state)
    assert distance(model(**tiny.sana_call()), stock(**tiny.sana_call())) < 1e-5
    assert not torch.allclose(model(**tiny.sana_call())[0], before)
    twin = copy.deepcopy(model)
    assert distance(twin(**tiny.sana_call()), stock(**tiny.sana_call())) < 1e-5


@torch.no_grad()
def test_a_copy_is_as_fast_and_its_own():
    _, model, _ = fast()
    expected = model(**tiny.sana_call())[0]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**tiny.sana_call())[0], expected)
    Acceleration.of(twin).undo()
    assert torch.equal(model(**tiny.sana_call())[0], expected)


@torch.no_grad()
def test_compiled_in_one_graph():
    _, model, _ = fast(lambda: tiny.sana(num_layers=1))
    expected = model(**tiny.sana_call())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert distance(compiled(**tiny.sana_call()), expected) < 1e-5


@torch.no_grad()
def test_bfloat16():
    stock = tiny.sana().to(torch.bfloat16)
    model = copy.deepcopy(stock)
    clipflow.accelerate(model, tier="fast")
    call = tiny.sana_call(torch.bfloat16)
    got = model(**call)
    assert got[0].dtype is torch.bfloat16
    assert 1e-4 < distance(got, stock.float()(**tiny.sana_call())) < 0.1
    model.float()  # casts the weights, which int8 does not follow
    assert distance(model(**tiny.sana_call()), stock(**tiny.sana_call())) < 1e-5


@torch.no_grad()
def test_weights_exchanged_behind_the_parameters():
    stock, model, _ = fast()
    for each in (stock, model):
        layer = each.transformer_blocks[0].ff.conv_inverted
        layer.weight.data = layer.weight.data * 3
    twin = copy.deepcopy(model)
    got, again, expected = (each(**tiny.sana_call()) for each in (model, twin, stock))
    assert torch.equal(got[0], again[0])
    conv = model.transformer_blocks[0].ff.conv_inverted
    assert not conv.forward.keywords["int8"].is_fresh()
    assert distance(got, expected) < 0.1


@torch.no_grad()
def test_a_block_alone_is_in_int8_too():
    stock, model, _ = fast()
    image = torch.randn(2, 32, 6, 8)
    got, expected = (each.transformer_blocks[0].ff(image) for each in (model, stock))
    assert 1e-4 < distance((got,), (expected,)) < 0.1
    conv = model.transformer_blocks[0].ff.conv_inverted
    assert conv(image).shape == (2, 160, 6, 8)


def test_other_devices_are_refused():
    with pytest.raises(AccelerationError, match=r"to_q is on meta; wanted the CPU for tier 'fast'"):
        clipflow.accelerate(tiny.sana().to("meta"), tier="fast")
