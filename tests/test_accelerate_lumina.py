"""`Lumina2Transformer2DModel` and `LuminaNextDiT2DModel` accelerated: same output in every call."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, LuminaPipeline

import clipflow
from tests import tiny_diffusers as tiny

MODELS = {
    "lumina2": (tiny.lumina2, tiny.lumina2_call),
    "lumina2-many-heads": (lambda: tiny.lumina2(num_kv_heads=4), tiny.lumina2_call),
    "lumina-next": (tiny.lumina_next, tiny.lumina_next_call),
    "lumina-next-no-qk-norm": (lambda: tiny.lumina_next(qk_norm=False), tiny.lumina_next_call),
}
one_of_each = pytest.mark.parametrize("name", ["lumina2", "lumina-next"])
every_model = pytest.mark.parametrize("name", MODELS)


def both(name):
    make, call = MODELS[name]
    stock = make()
    fused = copy.deepcopy(stock)
    clipflow.accelerate(fused)
    return stock, fused, call


def assert_same(stock, fused, call, error=1e-6):
    with torch.no_grad():
        expected, got = stock(**call), fused(**call)
    assert type(got) is type(expected)
    assert (got[0] - expected[0]).norm() <= error * expected[0].norm()


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_error_is_that_of_diffusers(name, dtype):
    stock, fused, call = both(name)
    own, ours = tiny.errors(stock.to(dtype), fused.to(dtype), lambda: call(dtype))
    assert ours <= 2 * own


@one_of_each
@pytest.mark.parametrize("lengths", [(9, 9), (4, 4), (2, 7), (9, 1)], ids=str)
def test_captions_of_any_length(name, lengths):
    stock, fused, call = both(name)
    assert_same(stock, fused, call(lengths=lengths))


@one_of_each
def test_bool_mask_and_return_dict(name):
    stock, fused, call = both(name)
    arguments = call()
    mask = "encoder_mask" if name == "lumina-next" else "encoder_attention_mask"
    assert_same(stock, fused, arguments | {mask: arguments[mask].bool(), "return_dict": True})


def test_left_padded_captions_of_lumina_next():
    stock, fused, call = both("lumina-next")
    arguments = call()
    assert_same(stock, fused, arguments | {"encoder_mask": arguments["encoder_mask"].flip(1)})


@pytest.mark.parametrize("kwargs", [{"scale": 1.0}, {}], ids=str)
def test_attention_kwargs_of_lumina2(kwargs):
    stock, fused, call = both("lumina2")
    assert_same(stock, fused, call() | {"attention_kwargs": kwargs})


def test_proportional_attention_of_lumina_next():
    stock, fused, call = both("lumina-next")
    options = {"cross_attention_kwargs": {"base_sequence_length": 5}}
    assert_same(stock, fused, call() | options)
    assert not torch.equal(fused(**call() | options)[0], fused(**call())[0])


@pytest.mark.parametrize("modulated", [True, False])
@torch.no_grad()
def test_a_lumina2_block_alone_is_stock(modulated):
    stock, fused, _ = both("lumina2")
    hidden, temb = torch.randn(2, 9, 48), torch.randn(2, 48) if modulated else None
    rope = torch.polar(torch.ones(2, 9, 6), torch.randn(2, 9, 6))
    mask = tiny.token_mask(2, 7, tokens=9).bool().flip(1)
    expected, got = (
        (model.layers if modulated else model.context_refiner)[0](hidden, mask, rope, temb)
        for model in (stock, fused)
    )
    assert (got - expected).norm() <= 1e-6 * expected.norm()


@torch.no_grad()
def test_a_lumina_next_block_alone_is_stock():
    stock, fused, _ = both("lumina-next")
    hidden, caption, temb = torch.randn(2, 9, 48), torch.randn(2, 5, 12), torch.randn(2, 48)
    rope = torch.polar(torch.ones(1, 9, 6), torch.randn(1, 9, 6))
    masks = (tiny.token_mask(9, 9, tokens=9), tiny.token_mask(2, 5, tokens=5).bool())
    expected, got = (
        model.layers[1](hidden, masks[0], rope, caption, masks[1], temb, {})
        for model in (stock, fused)
    )
    assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "name, mode",
    [(name, mode) for name in ("lumina2", "lumina-next") for mode in ("float32", "autocast")]
    + [("lumina2", "checkpointing")],
)
def test_gradients(name, mode):
    stock, fused, call = both(name)
    grads = []
    for model in (stock, fused):
        model.train()
        if mode == "checkpointing":
            model.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            sample = model(**call())[0]
        sample.float().square().mean().backward()
        used = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        grads.append(torch.cat(used))
    error = 3e-2 if mode == "autocast" else 3e-6
    assert (grads[0] - grads[1]).norm() <= error * grads[0].norm()


def test_compiled_in_one_graph():
    fused = tiny.lumina_next(num_layers=1)
    clipflow.accelerate(fused)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert_same(fused, compiled, tiny.lumina_next_call())


def test_a_lumina2_block_compiled_in_one_graph():
    """The model around its blocks asks for the lengths of captions, in stock as here."""
    fused = tiny.lumina2(num_layers=1)
    clipflow.accelerate(fused)
    rope = torch.polar(torch.ones(2, 9, 6), torch.randn(2, 9, 6))
    call = {
        "hidden_states": torch.randn(2, 9, 48), "attention_mask": None, "image_rotary_emb": rope,
        "temb": torch.randn(2, 48),
    }  # fmt: skip
    compiled = torch.compile(fused.layers[0], backend="eager", fullgraph=True)
    with torch.no_grad():
        expected, got = fused.layers[0](**call), compiled(**call)
    assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "name, kind", [("lumina2", Lumina2Pipeline), ("lumina-next", LuminaPipeline)]
)
def test_inside_the_stock_pipeline(name, kind):
    stock, fused, _ = both(name)
    embeds = torch.randn(2, 1, 9, 12)
    masks = [tiny.token_mask(length, tokens=9) for length in (2, 6)]
    images = []
    for model in (stock, fused):
        scheduler = FlowMatchEulerDiscreteScheduler()
        nothing = {"vae": None, "text_encoder": None, "tokenizer": None}
        pipe = kind(transformer=model, scheduler=scheduler, **nothing)
        pipe.set_progress_bar_config(disable=True)
        images += pipe(
            prompt=None, negative_prompt=None, num_inference_steps=3, height=64, width=96,
            prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], output_type="latent",
            prompt_attention_mask=masks[0], negative_prompt_attention_mask=masks[1],
            generator=torch.Generator().manual_seed(3), guidance_scale=4.0, return_dict=False,
        )  # fmt: skip
    assert (images[1] - images[0]).norm() <= 1e-5 * images[0].norm()


LATER = {
    "lumina2": (
        "layers.1", "layers.1.attn", "layers.0.attn.norm_k", "layers.1.ffn_norm2", "norm_out",
        "context_refiner.0.attn.norm_q", "context_refiner.0", "noise_refiner.0.norm1.norm",
        "layers.1.feed_forward", "layers.1.feed_forward.silu", "layers.0.norm1",
    ),
    "lumina-next": (
        "layers.1", "layers.1.attn2", "layers.0.attn1.norm_k", "layers.1.norm1_context",
        "layers.1.feed_forward", "layers.0.norm1", "norm_out.norm", "layers.0.ffn_norm1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, part", [(name, part) for name in LATER for part in LATER[name]])
def test_a_hook_added_later_runs(name, part):
    stock, fused, call = both(name)

    def shrink(module, args, out):
        return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5

    with torch.no_grad():
        before = fused(**call())[0]
    for model in (stock, fused):
        model.get_submodule(part).register_forward_hook(shrink)
    assert_same(stock, fused, call(), error=2e-6)
    with torch.no_grad():
        assert not torch.allclose(fused(**call())[0], before)
