"""SANA-1.5: queries and keys normed across heads, against diffusers' own transformer."""

import copy
import dataclasses
import itertools
from functools import partial

import pytest
import torch
from tiny_diffusers import sana
from tiny_dit import CPU

from clipflow.models.dits.sana import SanaConfig, SanaTransformer
from clipflow.models.folders.parsing import build
from clipflow.models.unilip import UniLIPConfig
from clipflow.models.unilip.published import unilip_1b_config
from clipflow.sampling import PlanSpec, SamplingPlan, flow_schedule, sample

CONFIG = SanaConfig(
    in_channels=4,
    out_channels=4,
    num_layers=3,
    num_attention_heads=4,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    caption_channels=12,
    mlp_ratio=2.5,
    sample_size=8,
    norm_eps=1e-6,
    position_table=False,
    interpolation_scale=1.0,
    qk_norm="rms_norm_across_heads",
)
LATENTS = (4, 6, 8)


@pytest.fixture(scope="module")
def pair():
    """(diffusers' transformer, ours with its weights); the norms' weights are not 1."""
    stock = sana(qk_norm="rms_norm_across_heads")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in stock.named_parameters():
        if ".norm_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    ours = SanaTransformer(CONFIG)
    ours.load_state_dict(stock.state_dict())
    return stock, ours.requires_grad_(False).eval()


def inputs():
    """(noise, null, cond), two samples with conditions of their own."""
    generator = torch.Generator().manual_seed(2)
    draw = partial(torch.randn, generator=generator)
    return draw(2, *LATENTS), [torch.zeros(9, 12)], [draw(9, 12), draw(9, 12)]


def spec_of(**more):
    schedule = flow_schedule(3, shift=1.0)
    # Times of BLIP3o-NEXT are 1000 times the level and not cut to integers.
    sigmas = schedule.sigmas.tolist()
    values = {
        "sigmas": tuple(sigmas),
        "timesteps": tuple(1000 * sigma for sigma in sigmas[:-1]),
        "solver": "euler",
        "samples": 2,
        "guided": True,
        "latent_shape": LATENTS,
        "conditions": (1, 2),
        "condition_length": 9,
        "dtype": torch.float32,
        "device": CPU,
    }
    return PlanSpec(**{**values, **more})


def stock_run(stock, noise, null, cond):
    hidden = torch.stack([null[0], null[0], *cond]).to(noise)
    sigmas = spec_of().sigmas
    latents = noise
    for sigma, after in itertools.pairwise(sigmas):
        times = torch.full((4,), 1000 * sigma)
        rows = torch.cat([latents, latents])
        without, given = stock(rows, hidden, times, return_dict=False)[0].chunk(2)
        latents = latents + (after - sigma) * (without + 2.0 * (given - without))
    return latents


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_velocity_is_as_exact_as_that_of_diffusers(pair, padded):
    stock, ours = pair
    noise, _, cond = inputs()
    cond, times = torch.stack(cond), torch.tensor([812.5, 30.25])
    mask = torch.ones(2, 9)
    mask[1, : 4 if padded else 0] = 0
    keep = {"encoder_attention_mask": mask, "return_dict": False}
    truth = copy.deepcopy(stock).double()(noise.double(), cond.double(), times, **keep)[0]
    theirs = stock(noise, cond, times, **keep)[0]
    assert error(ours(noise, times, cond, mask), truth) <= 2 * error(theirs, truth)


@torch.no_grad()
def test_a_plan_is_as_exact_as_diffusers(pair):
    stock, ours = pair
    noise, null, cond = inputs()
    plan = SamplingPlan(spec_of(), ours.denoiser(spec_of()))
    found = plan.run(noise, null, cond, guidance=2.0)
    truth = stock_run(copy.deepcopy(stock).double(), noise.double(), null, cond)
    assert error(found, truth) <= 2 * error(stock_run(stock, noise, null, cond), truth)
    assert sum(plan.denoiser.constants().values()) == ours.plan_bytes(spec_of())


@torch.no_grad()
def test_the_module_samples_the_same(pair):
    _, ours = pair
    noise, null, cond = inputs()
    hidden = torch.stack([null[0], null[0], *cond])
    schedule = dataclasses.replace(
        flow_schedule(3, shift=1.0), timesteps=torch.tensor(spec_of().timesteps)
    )
    found = sample(
        lambda x, t: ours(x, t, hidden), noise, schedule, solver="euler", guidance_scale=2.0
    )
    plan = SamplingPlan(spec_of(), ours.denoiser(spec_of()))
    torch.testing.assert_close(found, plan.run(noise, null, cond, guidance=2.0))


def test_the_fast_tier_is_close(pair):
    _, ours = pair
    noise, null, cond = inputs()
    spec = spec_of(tier="fast")
    plan = SamplingPlan(spec, ours.denoiser(spec))
    faithful = SamplingPlan(spec_of(), ours.denoiser(spec_of()))
    wanted = faithful.run(noise, null, cond, guidance=2.0)
    assert 0 < error(plan.run(noise, null, cond, guidance=2.0), wanted.double()) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    stock, ours = pair
    noise, null, cond = inputs()
    spec = spec_of(dtype=dtype)
    half = copy.deepcopy(ours).to(dtype)
    given = [t.to(dtype) for t in null], [t.to(dtype) for t in cond]
    found = SamplingPlan(spec, half.denoiser(spec)).run(noise, *given, guidance=2.0)
    with torch.no_grad():
        truth = stock_run(copy.deepcopy(stock).double(), noise.double(), null, cond)
    assert error(found, truth) < 3e-2


def test_kept_keys_are_normed(pair):
    _, ours = pair
    noise, null, cond = inputs()
    plan = SamplingPlan(spec_of(), ours.denoiser(spec_of()))
    plan.run(noise, null, cond)
    keys = plan.denoiser.keys.groups[-1]
    attention, tokens = ours.transformer_blocks[0].attn2, ours.embed_condition(torch.stack(cond))
    wanted = attention.norm_k(attention.to_k(tokens))
    stored = keys._buffer[0, :18].view(2, 9, 2, 32)
    torch.testing.assert_close(stored[:, :, 0], wanted)
    torch.testing.assert_close(stored[:, :, 1], attention.to_v(tokens))


def test_the_published_size():
    config = dataclasses.replace(
        CONFIG,
        in_channels=32,
        out_channels=32,
        num_layers=20,
        num_attention_heads=70,
        attention_head_dim=32,
        num_cross_attention_heads=20,
        cross_attention_head_dim=112,
        caption_channels=2304,
        sample_size=32,
    )
    with torch.device("meta"):
        shapes = SanaTransformer(config).state_dict()
    assert len(shapes) == 476
    assert sum(tensor.numel() for tensor in shapes.values()) == 1_604_641_952


def test_configurations_from_before_the_norm():
    values = unilip_1b_config().to_dict()
    del values["dit"]["qk_norm"]
    assert UniLIPConfig.from_dict(values).dit.qk_norm == "none"
    with pytest.raises(ValueError, match="qk_norm must be one of"):
        dataclasses.replace(CONFIG, qk_norm="layer_norm")
    with pytest.raises(ValueError, match="missing keys"):
        build(SanaConfig, {"qk_norm": "none"}, "test")
