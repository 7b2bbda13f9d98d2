"""Schedules against recorded ones, solvers against a known flow, guidance, training times."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from clipflow.sampling import (
    SOLVERS,
    FlowSchedule,
    draw_times,
    flow_matching_loss,
    flow_schedule,
    interpolate,
    sample,
    solver_table,
)
from clipflow.sampling.flow_matching import times_from_uniform

FIXTURE = Path(__file__).parent / "fixtures" / "unilip_tiny" / "tensors.safetensors"
ORDER = {"euler": 1, "heun": 2, "dpmpp_2m": 2}


def recorded(name):
    if not FIXTURE.exists():
        pytest.skip(f"the recorded tensors are not in {FIXTURE.parent}")
    with safe_open(FIXTURE, "pt") as tensors:
        return tensors.get_tensor(name)


@pytest.mark.parametrize("steps", [4, 20])
def test_schedule_equals_the_recorded_one(steps):
    schedule = flow_schedule(steps, shift=3.0)
    assert torch.equal(schedule.timesteps, recorded(f"sched.{steps}.timesteps"))
    assert torch.equal(schedule.sigmas, recorded(f"sched.{steps}.sigmas"))


def test_twenty_steps_have_the_published_timesteps():
    wanted = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"
    assert flow_schedule(20).timesteps.tolist() == [int(t) for t in wanted.split()]


def test_one_step_goes_from_noise_to_data():
    schedule = flow_schedule(1)
    assert len(schedule) == 1 and schedule.sigmas[-1] == 0


@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (-1, 3.0), (4, 0.0), (4, math.nan)])
def test_schedule_refuses_senseless_arguments(steps, shift):
    with pytest.raises(ValueError, match="flow_schedule"):
        flow_schedule(steps, shift=shift)


# Gaussian data of standard deviation SPREAD at MEAN: the flow has a closed form.
SPREAD, MEAN = 0.5, 0.7


def _scale(sigma):
    return math.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2)


def gaussian_velocity(x, sigma):
    centered = x - (1 - sigma) * MEAN
    clean = MEAN + (1 - sigma) * SPREAD**2 / _scale(sigma) ** 2 * centered
    noise = sigma / _scale(sigma) ** 2 * centered
    return noise - clean


def gaussian_flow(x, start, end):
    return (1 - end) * MEAN + _scale(end) / _scale(start) * (x - (1 - start) * MEAN)


def solve(name, sigmas, x):
    # The model is told the number of the level, and so knows the level itself.
    schedule = FlowSchedule(sigmas=sigmas, timesteps=torch.arange(len(sigmas) - 1))
    return sample(lambda x, k: gaussian_velocity(x, sigmas[k[0]].item()), x, schedule, solver=name)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_solver_has_its_order(name):
    x = torch.tensor([1.3], dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160):
        sigmas = torch.linspace(0.95, 0.3, steps + 1, dtype=torch.float64)
        errors.append((solve(name, sigmas, x) - gaussian_flow(x, 0.95, 0.3)).abs().item())
    orders = [math.log2(before / after) for before, after in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(ORDER[name], abs=0.1), errors


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_solver_reaches_data_from_full_noise(name):
    """sigma = 1 (log-SNR of minus infinity) and sigma = 0 are both within reach."""
    x = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    sigmas = torch.linspace(1.0, 0.0, 201, dtype=torch.float64)
    torch.testing.assert_close(
        solve(name, sigmas, x), gaussian_flow(x, 1.0, 0.0), atol=2e-2, rtol=0
    )


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_constant_velocity_is_solved_exactly(name):
    noise, data = torch.randn(2, 3, 2, 2, 2).unbind(0)
    found = sample(lambda x, t: noise - data, noise, flow_schedule(5), solver=name)
    # The schedule starts at 0.9997, where the latents are taken to be pure noise.
    torch.testing.assert_close(found, data, atol=5e-3, rtol=0)


def test_solver_refuses_bad_arguments():
    with pytest.raises(ValueError, match="dpmpp_2m"):
        solver_table("ddim", flow_schedule(4).sigmas)
    with pytest.raises(ValueError, match="fall"):
        solver_table("euler", torch.tensor([0.1, 0.5]))
    with pytest.raises(ValueError, match="at least 2"):
        solver_table("euler", torch.tensor([0.1]))


@pytest.mark.parametrize(
    ("name", "calls"), [("euler", 4), ("dpmpp_2m", 4), ("heun", 7)], ids=lambda v: str(v)
)
def test_model_calls_rows_and_times(name, calls):
    seen = []

    def model(x, t):
        seen.append((x.shape[0], x.dtype, t.tolist()))
        return torch.zeros_like(x)

    noise = torch.randn(2, 3, 4, 4)
    schedule = flow_schedule(4)
    options = {"solver": name, "model_dtype": torch.bfloat16}
    result = sample(model, noise, schedule, guidance_scale=2.0, **options)
    assert result.dtype == torch.float32
    assert len(seen) == calls and all(s[:2] == (4, torch.bfloat16) for s in seen)
    assert seen[0][2] == [999] * 4 and seen[-1][2] == [499] * 4

    seen.clear()
    sample(model, noise, schedule, guidance_scale=1.0, **options)
    assert all(rows == 2 for rows, _, _ in seen)


def test_callback_sees_each_step_and_may_replace_the_latents():
    seen = []

    def callback(step, timestep, latents):
        seen.append((step, timestep))
        return torch.ones_like(latents) if step == 3 else None

    found = sample(lambda x, t: x, torch.randn(1, 1, 2, 2), flow_schedule(4), callback=callback)
    assert seen == list(enumerate(flow_schedule(4).timesteps.tolist()))
    assert torch.equal(found, torch.ones(1, 1, 2, 2))


def test_training_levels_are_the_thousandths():
    times = times_from_uniform(torch.arange(1000, dtype=torch.float64) / 1000 + 5e-4)
    assert torch.equal(times.timesteps, torch.arange(1000, 0, -1))
    assert torch.equal(times.sigmas, torch.arange(1000, 0, -1) / 1000)
    assert times_from_uniform(torch.tensor([0.0, 1.0])).timesteps.tolist() == [1000, 1]


def test_drawn_times_repeat_with_their_generator_and_follow_mean_and_shift():
    def draw(**options):
        return draw_times(4000, generator=torch.Generator().manual_seed(3), **options).sigmas

    assert torch.equal(draw(), draw())
    assert draw().mean().item() == pytest.approx(0.5, abs=0.02)
    assert draw(mean=1.0).mean() < 0.4
    assert draw(shift=3.0).mean() > 0.6
    assert draw(std=5.0).min() > 0 and draw(std=5.0).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolate_ends_at_data_and_noise(dtype):
    data, noise = torch.randn(2, 3, 2, 4, 4).to(dtype).unbind(0)
    noisy, target = interpolate(data, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert noisy.dtype == target.dtype == dtype
    assert torch.equal(noisy[0], data[0]) and torch.equal(noisy[1], noise[1])
    torch.testing.assert_close(
        noisy[2], (0.75 * data[2].float() + 0.25 * noise[2].float()).to(dtype)
    )
    assert torch.equal(target, (noise.float() - data.float()).to(dtype))
    assert flow_matching_loss(target, target) == 0
