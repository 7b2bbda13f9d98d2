"""`clipflow.accelerate` itself: what it changes, what it refuses, and how it is undone."""

import copy
import functools
import io
import pickle

import diffusers
import pytest
import torch
from diffusers.models.attention import LuminaFeedForward
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers import sana_transformer
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from torch import nn

import clipflow
from clipflow import Acceleration, AccelerationError
from clipflow.acceleration.replace import check_specimen
from tests import tiny_diffusers as tiny

MODELS = {
    "sana": (tiny.sana, tiny.sana_call),
    "lumina2": (tiny.lumina2, tiny.lumina2_call),
    "lumina-next": (tiny.lumina_next, tiny.lumina_next_call),
}
every_model = pytest.mark.parametrize("make, call", MODELS.values(), ids=MODELS)


def attributes(model: nn.Module) -> list[dict[str, object]]:
    """All that each submodule holds, but for the containers of PyTorch, which are copied."""
    return [
        {name: value for name, value in module.__dict__.items() if not isinstance(value, dict)}
        for module in model.modules()
    ]


@every_model
@torch.no_grad()
def test_undo_leaves_nothing_behind(make, call):
    model = make()
    before, expected = attributes(model), model(**call())[0]
    report = clipflow.accelerate(model)
    assert attributes(model) != before
    report.undo()
    assert attributes(model) == before
    assert torch.equal(model(**call())[0], expected)
    clipflow.accelerate(model)  # and again
    with pytest.raises(AccelerationError, match="undone already"):
        report.undo()


@every_model
def test_the_state_dict_is_that_of_the_stock_model(make, call):
    model = make()
    names = list(model.state_dict())
    tensors = {name: id(p) for name, p in (*model.named_parameters(), *model.named_buffers())}
    modules = {name: id(m) for name, m in model.named_modules()}
    clipflow.accelerate(model)
    assert list(model.state_dict()) == names
    after = {name: id(p) for name, p in (*model.named_parameters(), *model.named_buffers())}
    assert after == tensors
    assert {name: id(m) for name, m in model.named_modules()} == modules
    model.load_state_dict(make().state_dict(), strict=True)


@every_model
@torch.no_grad()
def test_classes_and_other_instances_stay(make, call):
    other, model = make(), make()
    expected = other(**call())[0]
    clipflow.accelerate(model)
    assert Acceleration.of(other) is None
    assert torch.equal(other(**call())[0], expected)
    assert type(model).forward is type(other).forward


@every_model
@torch.no_grad()
def test_a_deep_copy_has_its_own_acceleration(make, call):
    model = make()
    report = clipflow.accelerate(model)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.zero_()
    assert twin(**call())[0].abs().max() == 0  # it reads its own weights
    assert model(**call())[0].abs().max() > 0
    Acceleration.of(twin).undo()
    assert Acceleration.of(twin) is None and Acceleration.of(model) is report
    assert "forward" in model.__dict__ and "forward" not in twin.__dict__
    report.undo()


@torch.no_grad()
def test_pickled_with_its_acceleration():
    model = tiny.sana(num_layers=1)
    clipflow.accelerate(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(**tiny.sana_call())[0], model(**tiny.sana_call())[0])
    Acceleration.of(twin).undo()
    assert Acceleration.of(model) is not None


def test_save_pretrained_writes_the_stock_model(tmp_path):
    model = tiny.sana(num_layers=1)
    clipflow.accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config["_class_name"] == "SanaTransformer2DModel"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@every_model
def test_the_report_names_every_part(make, call):
    report = clipflow.accelerate(make())
    for name, part in report.module.named_modules():
        if "forward" in part.__dict__:
            assert (
                f"{name or '(the module)'}: {type(part).__name__}.forward -> " in report.explain()
            )
    for kind, count in report.replaced.items():
        assert f"{count} x {kind}" in str(report)
    for name in report.stays:
        assert report.module.get_submodule(name) is not None
        assert name in str(report)
    assert report.tier == "faithful" and "tier faithful" in str(report)


def test_the_report_of_sana():
    report = clipflow.accelerate(tiny.sana())
    assert report.replaced == {
        "SanaLinearAttnProcessor2_0": 3,
        "SanaAttnProcessor2_0": 3,
        "GLUMBConv.forward": 3,
        "SanaTransformerBlock.forward": 3,
        "RMSNorm.forward": 1,
        "SanaModulatedNorm.forward": 1,
        "SanaTransformer2DModel.forward": 1,
    }
    assert report.stays == {
        "patch_embed": "PatchEmbed",
        "time_embed": "AdaLayerNormSingle",
        "caption_projection": "PixArtAlphaTextProjection",
        "proj_out": "Linear",
    }


class Lora(nn.Module):
    """A layer around a layer, as LoRA libraries insert it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


class DerivedNorm(nn.LayerNorm):
    pass


def _lora(model):
    model.transformer_blocks[1].attn1.to_q = Lora(model.transformer_blocks[1].attn1.to_q)


def _hook(model):
    model.transformer_blocks[1].ff.register_forward_hook(lambda *_: None)


def _backward_hook(model):
    model.proj_out.register_full_backward_hook(lambda *_: None)


def _own_forward(model):
    layer = model.transformer_blocks[0].attn2
    layer.forward = functools.partial(type(layer).forward, layer)


def _processor(model):
    model.transformer_blocks[0].attn1.set_processor(sana_transformer.SanaAttnProcessor2_0())


def _derived_layer(model):
    model.transformer_blocks[2].norm2 = nn.LayerNorm(32)
    model.transformer_blocks[2].norm2.__class__ = DerivedNorm


def _affine_norm(model):
    model.transformer_blocks[2].norm2 = nn.LayerNorm(32)


def _parametrized(model):
    nn.utils.parametrizations.weight_norm(model.transformer_blocks[0].attn1.to_v)


def _feed_forward_norm(model):
    model.transformer_blocks[0].ff = sana_transformer.GLUMBConv(32, 32, norm_type="rms_norm")


def _storage_dtype(model):
    model.proj_out.to(torch.float8_e4m3fn)


def _compiled(model):
    model.transformer_blocks[0].compile()


def _rescaled(model):
    model.transformer_blocks[0].attn2.rescale_output_factor = 2.0


CHANGES = {
    _lora: r"transformer_blocks.1.attn1.to_q is .*Lora; wanted a layer of torch.nn or diffusers",
    _hook: r"transformer_blocks.1.ff is GLUMBConv with hooks or a forward of its own",
    _backward_hook: r"proj_out is Linear with hooks",
    _own_forward: r"transformer_blocks.0.attn2 is Attention with hooks or a forward of its own",
    _processor: r"attn1.processor is .*SanaAttnProcessor2_0; wanted .*SanaLinearAttnProcessor2_0",
    _derived_layer: r"transformer_blocks.2.norm2 is .*DerivedNorm",
    _affine_norm: r"transformer_blocks.2.norm2.elementwise_affine is True; wanted False",
    _parametrized: r"transformer_blocks.0.attn1.to_v is .*Parametrized",
    _feed_forward_norm: r"ff.norm_type is 'rms_norm'; wanted None",
    _storage_dtype: r"proj_out.weight is .* in torch.float8_e4m3fn; wanted .* floating dtype",
    _compiled: r"transformer_blocks.0 is compiled SanaTransformerBlock",
    _rescaled: r"attn2.rescale_output_factor is 2.0; wanted 1.0",
}


@pytest.mark.parametrize("change, message", CHANGES.items(), ids=[c.__name__ for c in CHANGES])
def test_a_model_that_is_not_stock_is_refused_whole(change, message):
    model = tiny.sana()
    change(model)
    before = attributes(model)
    with pytest.raises(AccelerationError, match=message):
        clipflow.accelerate(model)
    assert attributes(model) == before


def test_an_option_without_an_op_is_refused():
    model = tiny.sana(qk_norm="layer_norm")
    with pytest.raises(AccelerationError, match=r"attn1.norm_q is .*LayerNorm; wanted .*RMSNorm"):
        clipflow.accelerate(model)
    with pytest.raises(AccelerationError, match=r"norm2.elementwise_affine is True; wanted False"):
        clipflow.accelerate(tiny.sana(norm_elementwise_affine=True))


class Derived(diffusers.SanaTransformer2DModel):
    pass


class SanaTransformer2DModel(diffusers.SanaTransformer2DModel):
    """Of the same name, but from elsewhere."""


@pytest.mark.parametrize("kind", [Derived, SanaTransformer2DModel])
def test_a_derived_class_is_refused(kind):
    model = tiny.sana(num_layers=1)
    model.__class__ = kind
    with pytest.raises(AccelerationError, match=r"is .*; wanted one of diffusers' .*SanaTrans"):
        clipflow.accelerate(model)


def test_other_things_are_refused():
    for other in (nn.Linear(2, 2), tiny.sana, None, tiny.sana(num_layers=1).transformer_blocks[0]):
        with pytest.raises(AccelerationError, match="wanted one of diffusers'"):
            clipflow.accelerate(other)
    with pytest.raises(ValueError, match="tier must be one of faithful, fast, got 'quick'"):
        clipflow.accelerate(tiny.sana(num_layers=1), tier="quick")


def test_twice_is_an_error():
    model = tiny.sana(num_layers=1)
    report = clipflow.accelerate(model)
    with pytest.raises(AccelerationError, match="is in place; wanted a stock module: undo"):
        clipflow.accelerate(model)
    assert Acceleration.of(model) is report


def test_another_version_of_diffusers_is_refused(monkeypatch):
    def forward(self, hidden_states, ids):
        raise AssertionError

    model = tiny.sana(num_layers=1)
    monkeypatch.setattr(sana_transformer.GLUMBConv, "forward", forward)
    message = r"forward of diffusers .* is \(self, hidden_states, ids\); wanted \(self, hidden_st"
    with pytest.raises(AccelerationError, match=message):
        clipflow.accelerate(model)


DRIFT = {
    "feed-forward": (tiny.sana, sana_transformer.GLUMBConv, "forward"),
    "linear attention": (tiny.sana, SanaLinearAttnProcessor2_0, "__call__"),
    "output norm": (tiny.sana, sana_transformer.SanaModulatedNorm, "forward"),
    "lumina2 attention": (tiny.lumina2, Lumina2AttnProcessor2_0, "__call__"),
    "lumina-next feed-forward": (tiny.lumina_next, LuminaFeedForward, "forward"),
}


@pytest.mark.parametrize("make, kind, name", DRIFT.values(), ids=DRIFT)
def test_another_formula_under_the_same_signature_is_refused(make, kind, name, monkeypatch):
    stock = getattr(kind, name)
    changed = functools.wraps(stock)(lambda *args, **kwargs: stock(*args, **kwargs).abs())
    monkeypatch.setattr(kind, name, changed)
    check_specimen.cache_clear()
    model = make()
    before = attributes(model)
    with pytest.raises(AccelerationError, match=r"is off by .* from what diffusers .* computes"):
        clipflow.accelerate(model)
    assert attributes(model) == before


def test_trying_a_recipe_leaves_the_random_numbers_alone():
    model, state = tiny.sana(num_layers=1), torch.get_rng_state()
    check_specimen.cache_clear()
    clipflow.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_undo_refuses_where_others_came_after():
    model = tiny.sana(num_layers=1)
    report = clipflow.accelerate(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    before = attributes(model)
    with pytest.raises(AccelerationError, match="forward of the module was replaced after"):
        report.undo()
    assert attributes(model) == before
    model.forward = ours
    report.undo()


def test_training_state_moves_with_the_module():
    model = tiny.sana(num_layers=1)
    clipflow.accelerate(model)
    model.train().double()
    assert model(**tiny.in_dtype(tiny.sana_call(), torch.float64))[0].dtype == torch.float64
    torch.save(model.state_dict(), io.BytesIO())
