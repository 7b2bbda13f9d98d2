"""`SanaTransformer2DModel` accelerated: same output in every call its pipeline can make."""

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline

import clipflow
from tests import tiny_diffusers as tiny

CONFIGS = {
    "plain": {},
    "qk-norm": {"qk_norm": "rms_norm_across_heads"},
    "patches": {"patch_size": 2},
    "position-table": {"interpolation_scale": 1.0, "attention_bias": True},
    "no-blocks": {"num_layers": 0},
}


def both(**config):
    stock = tiny.sana(**config)
    fused = copy.deepcopy(stock)
    return stock, fused, clipflow.accelerate(fused)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_error_is_that_of_diffusers(config, dtype):
    stock, fused, _ = both(**config)
    stock, fused = stock.to(dtype), fused.to(dtype)
    own, ours = tiny.errors(stock, fused, lambda: tiny.sana_call(dtype))
    assert ours <= 2 * own


CALLS = {
    "no mask": {"encoder_attention_mask": None},
    "bool mask": {"encoder_attention_mask": tiny.token_mask(2, 7, tokens=9).bool()},
    "left-padded": {"encoder_attention_mask": tiny.token_mask(2, 7, tokens=9).flip(1)},
    "equal lengths": {"encoder_attention_mask": tiny.token_mask(4, 4, tokens=9)},
    "float mask": {"encoder_attention_mask": tiny.token_mask(2, 7, tokens=9).float()},
    "bias": {"encoder_attention_mask": torch.randn(2, 1, 9)},
    "attention_kwargs": {"attention_kwargs": {"scale": 1.0}},
    "attention_mask": {"attention_mask": torch.ones(2, 48)},
    "one control": {"controlnet_block_samples": (torch.randn(2, 48, 32),)},
    "controls": {"controlnet_block_samples": tuple(torch.randn(2, 2, 48, 32))},
    "broadcast control": {"controlnet_block_samples": (torch.randn(1, 48, 32),)},
    "return_dict": {"return_dict": True},
}


@pytest.mark.parametrize("changed", CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_every_argument_means_the_same(changed):
    stock, fused, _ = both()
    call = tiny.sana_call() | changed
    expected, got = stock(**call), fused(**call)
    assert type(got) is type(expected)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=3e-6)


@torch.no_grad()
def test_a_sample_without_real_tokens_attends_to_all():
    stock, fused, _ = both()
    call = tiny.sana_call(lengths=(0, 9))
    # diffusers adds -10000 to all its scores, which rounds them.
    torch.testing.assert_close(fused(**call)[0], stock(**call)[0], rtol=0, atol=1e-3)


@torch.no_grad()
def test_guidance_embeddings():
    stock, fused, _ = both(guidance_embeds=True)
    call = tiny.sana_call() | {"guidance": torch.tensor([4.5, 1.0])}
    torch.testing.assert_close(fused(**call)[0], stock(**call)[0], rtol=0, atol=3e-6)


@torch.no_grad()
def test_float16_stays_finite_as_in_diffusers():
    stock, fused, _ = both()
    stock, fused = stock.half(), fused.half()
    with torch.no_grad():
        for model in (stock, fused):
            model.transformer_blocks[0].attn1.to_out[0].weight.mul_(60000)
    call = tiny.sana_call(torch.float16)
    assert fused(**call)[0].isfinite().all() and stock(**call)[0].isfinite().all()


@torch.no_grad()
def test_a_block_alone_is_stock():
    stock, fused, _ = both()
    hidden, condition = torch.randn(2, 48, 32), torch.randn(2, 9, 32)
    bias = (1 - tiny.token_mask(2, 7, tokens=9).float())[:, None] * -10000.0
    time = torch.randn(2, 6 * 32)
    expected, got = (
        model.transformer_blocks[1](hidden, None, condition, bias, time, 6, 8)
        for model in (stock, fused)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("mode", ["float32", "autocast", "checkpointing"])
def test_gradients(mode):
    stock, fused, _ = both()
    grads = []
    for model in (stock, fused):
        model.train()
        if mode == "checkpointing":
            model.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            sample = model(**tiny.sana_call())[0]
        sample.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() <= (1e-2 if mode == "autocast" else 2e-6) * grads[0].norm()


def test_compiled_in_one_graph():
    _, fused, _ = both(num_layers=1)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, got = fused(**tiny.sana_call())[0], compiled(**tiny.sana_call())[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)


class _Ours(torch.nn.Linear):
    """What a LoRA library puts in place of a layer."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "layer", ["transformer_blocks.1.attn2.to_k", "caption_projection.linear_1"]
)
@torch.no_grad()
def test_a_linear_layer_exchanged_later_is_used(layer):
    stock, fused, _ = both()
    for model in (stock, fused):
        old = model.get_submodule(layer)
        new = _Ours(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        model.set_submodule(layer, new)
    call = tiny.sana_call()
    torch.testing.assert_close(fused(**call)[0], stock(**call)[0], rtol=0, atol=3e-6)


LATER = [
    "transformer_blocks.1", "transformer_blocks.1.ff", "transformer_blocks.1.attn2", "norm_out",
    "transformer_blocks.1.norm2", "transformer_blocks.1.ff.conv_point", "patch_embed.proj",
]  # fmt: skip


@pytest.mark.parametrize("name", LATER)
@torch.no_grad()
def test_a_hook_added_later_runs(name):
    stock, fused, _ = both()
    for model in (stock, fused):
        model.get_submodule(name).register_forward_hook(lambda module, args, out: out * 1.5)
    call = tiny.sana_call()
    torch.testing.assert_close(fused(**call)[0], stock(**call)[0], rtol=0, atol=5e-6)


@torch.no_grad()
def test_a_processor_installed_later_runs():
    class Silent:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return torch.zeros_like(hidden_states)

    stock, fused, report = both()
    for model in (stock, fused):
        model.transformer_blocks[0].attn2.set_processor(Silent())
    call = tiny.sana_call()
    torch.testing.assert_close(fused(**call)[0], stock(**call)[0], rtol=0, atol=3e-6)
    with pytest.raises(clipflow.AccelerationError, match="attn2 was replaced after accelerate"):
        report.undo()


def images(transformer, **options):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipe = SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(2, 1, 9, 12, generator=generator)
    masks = [tiny.token_mask(length, tokens=9) for length in (2, 6)]
    return pipe(
        negative_prompt=None, num_inference_steps=4, height=192, width=256, generator=generator,
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], output_type="latent",
        prompt_attention_mask=masks[0], negative_prompt_attention_mask=masks[1],
        use_resolution_binning=False, **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_inside_the_stock_pipeline(guidance):
    stock, fused, _ = both()
    expected = images(stock, guidance_scale=guidance)
    got = images(fused, guidance_scale=guidance)
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    scaled = images(fused, guidance_scale=guidance, attention_kwargs={"scale": 1.0})
    assert (scaled - expected).norm() <= 1e-5 * expected.norm()
