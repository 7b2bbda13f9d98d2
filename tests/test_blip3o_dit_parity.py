"""The DiT of BLIP3-o against tensors that the reference's own classes recorded, in float32.

The bar is 1e-5 of the largest recorded value. CLIPFLOW_PARITY_DIR names another recording.
"""

import copy

import numpy as np
import pytest
import torch
from blip3o_fixture import recorded, recorded_dit, recorded_gqa_dit
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from clipflow.sampling import euler_schedule, sample

TOLERANCE = 1e-5


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"largest difference {error:.2e}, allowed {tolerance:.2e}"


def seen_inside(model: torch.nn.Module, names: dict[str, str], inputs: tuple) -> dict[str, Tensor]:
    """Outputs of submodules by the names that `names` gives them, and under "" the model's."""
    found, handles = {}, []
    for name, shown in names.items():
        keep = lambda _, args, out, shown=shown: found.update({f"{shown}.in": args[0], shown: out})  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        found[""] = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def test_velocity_and_what_is_inside():
    dit, io = recorded_dit(), recorded()
    inputs = tuple(io[f"dit.in.{name}"] for name in ("x", "timestep", "z_latents"))
    found = seen_inside(
        dit,
        {
            "caption_projection": "caption_projection",
            "patch_embedder.proj": "patch_tokens",
            "time_caption_embed": "temb",
            "layers.0.attn1": "layers.0.attn1.out",
            "layers.0.attn2": "layers.0.attn2.out",
            "layers.0.norm1.linear": "modulation",
            "layers.0.feed_forward": "layers.0.feed_forward.out",
            "norm_out.linear_2": "norm_out",
        },
        inputs,
    )
    assert_close(found[""], io["dit.out.velocity"])
    found["layers.0.norm1.x"] = found["layers.0.attn1.out.in"]
    found["layers.0.feed_forward.in"] = found["layers.0.feed_forward.out.in"]
    modulation = found["modulation"].chunk(4, dim=-1)
    for place, name in enumerate(("", "gate_msa", "scale_mlp", "gate_mlp")):
        found[f"layers.0.norm1.{name}"] = modulation[place]
    inside = {name.removeprefix("dit.mid."): io[name] for name in io if name.startswith("dit.mid.")}
    checked = found.keys() & inside.keys()
    for name in checked:
        assert_close(found[name], inside[name])
    outs = {"layers.0.out", "layers.1.out"}  # fused with the norm that follows
    assert inside.keys() - checked == outs | {"rope_cos", "rope_sin"}


@torch.no_grad()
def test_rotary_tables():
    io, wide = recorded(), recorded("dit_gqa_io")
    cos, sin = recorded_dit().rope_table((2, 2))
    assert_close(cos, io["dit.mid.rope_cos"][0])
    assert_close(sin, io["dit.mid.rope_sin"][0])
    dit = copy.deepcopy(recorded_gqa_dit())
    object.__setattr__(dit.config, "num_attention_heads", 1)
    object.__setattr__(dit.config, "hidden_size", 64)
    cos, sin = dit.rope_table((8, 8))
    assert_close(cos.view(8, 8, 32), wide["rope.head64.cos_8x8"])
    assert_close(sin.view(8, 8, 32), wide["rope.head64.sin_8x8"])


@torch.no_grad()
def test_grouped_heads_and_an_oblong_grid():
    dit, io = recorded_gqa_dit(), recorded("dit_gqa_io")
    inputs = [io[f"in.{name}"] for name in ("x", "timestep", "z_latents")]
    wanted = io["out.velocity"]
    assert_close(dit(*inputs), wanted)
    half = copy.deepcopy(dit).bfloat16()
    found = half(inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16())
    assert found.dtype == torch.bfloat16
    error, theirs = (
        (velocity.float() - wanted).norm() for velocity in (found, io["out.velocity_bf16"])
    )
    assert error <= 1.5 * theirs


@pytest.mark.parametrize("steps", [4, 30])
def test_schedule(steps):
    schedule, io = euler_schedule(steps), recorded()
    assert schedule.timesteps.dtype == torch.int64
    # What was recorded is before the truncation.
    assert schedule.timesteps.tolist() == io[f"sample.steps{steps}.timesteps"].long().tolist()
    torch.testing.assert_close(
        schedule.sigmas, io[f"sample.steps{steps}.sigmas"], rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedules_of_any_length_are_those_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    for steps in range(1, 64):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        found, exact = (
            euler_schedule(steps, shift=shift),
            euler_schedule(steps, shift=shift, truncate=False),
        )
        assert torch.equal(found.sigmas, scheduler.sigmas)
        assert torch.equal(found.timesteps, scheduler.timesteps.long())
        assert torch.equal(exact.timesteps, scheduler.timesteps)
    with pytest.raises(ValueError, match="euler_schedule: num_steps must be at least 1, got 0"):
        euler_schedule(0)


def test_shifted_schedule():
    sigmas = euler_schedule(4, shift=3.0).sigmas
    torch.testing.assert_close(sigmas, recorded()["sample.shift3.steps4.sigmas"], rtol=0, atol=1e-7)


def sampled(steps: int, guidance: float, conditions: Tensor) -> Tensor:
    dit, io = recorded_dit(), recorded()
    rows = torch.cat([torch.zeros_like(conditions), conditions])  # null rows first
    return sample(
        lambda latents, times: dit(latents, times, rows[-len(latents) :]),
        io["sample.noise"],
        euler_schedule(steps),
        solver="euler",
        guidance_scale=guidance,
    )


@pytest.mark.parametrize("steps", [4, 30])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples(steps, guidance):
    io = recorded()
    found = sampled(steps, guidance, io["dit.in.z_latents"][:2])
    assert_close(found, io[f"sample.steps{steps}.cfg{guidance:.0f}"])


def test_two_pictures_of_one_condition():
    io = recorded()
    found = sampled(4, 3.0, io["dit.in.z_latents"][:1].expand(2, -1, -1))
    assert_close(found, io["sample.steps4.cfg3.nimg2"])


@pytest.mark.parametrize("kind", ["train", "train_drop"])
def test_gradients_of_a_recorded_training_step(kind):
    io, dit = recorded(), copy.deepcopy(recorded_dit()).requires_grad_(True)
    velocity = dit(*(io[f"{kind}.dit.{name}"] for name in ("x", "timestep", "z_latents")))
    assert_close(velocity, io[f"{kind}.dit.out"])
    sigma = (io[f"{kind}.dit.timestep"] / 1000)[:, None, None, None]
    data = (io[f"{kind}.dit.x"] - sigma * io[f"{kind}.noise"]) / (1 - sigma)
    loss = (velocity - (io[f"{kind}.noise"] - data)).square().mean()
    torch.testing.assert_close(loss, io[f"{kind}.loss"], rtol=1e-5, atol=0)
    loss.backward()
    assert_close(dit.layers[0].gate.grad, io[f"{kind}.grad.dit.layers.0.gate"])
    wanted = io[f"{kind}.grad.dit.layers.1.attn2.to_k"]
    assert_close(dit.layers[1].attn2.to_k.weight.grad, wanted)
