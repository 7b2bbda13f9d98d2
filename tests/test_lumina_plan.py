"""What is particular to plans of the Lumina-Next DiT: modulations, bytes, kernels, patches."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_dit import CAPTION, inputs_of, make_plan, reference_run, tiny_lumina, tiny_spec

from clipflow.errors import SamplingError
from clipflow.models.dits import lumina_modulation
from clipflow.sampling import SamplingPlan, TaylorForecast, euler_schedule


@pytest.fixture(scope="module")
def dit():
    return tiny_lumina()


def one_step_at_a_time(monkeypatch):
    monkeypatch.setattr(lumina_modulation, "MOST_BYTES", 0)


@pytest.mark.parametrize(
    ("samples", "conditions", "interval"),
    [(4, (1, 2), (0.0, 1.0)), (2, (2, 2), (0.3, 0.7)), (1, (1, 1), (0.5, 1.0))],
)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_modulations_of_one_step_are_those_of_all(
    dit, monkeypatch, samples, conditions, interval, solver
):
    spec = tiny_spec(samples, conditions, solver=solver, guidance_interval=interval)
    inputs = inputs_of(spec)
    at_once = make_plan(dit, spec)
    wanted = at_once.run(*inputs, guidance=2.0)
    one_step_at_a_time(monkeypatch)
    stepwise = make_plan(dit, spec)
    torch.testing.assert_close(stepwise.run(*inputs, guidance=2.0), wanted, atol=1e-5, rtol=1e-5)
    assert "modulations of all steps" in at_once.explain()
    assert "modulations of one step" in stepwise.explain()
    assert stepwise.denoiser.modulations.nbytes < at_once.denoiser.modulations.nbytes


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "more", [{}, {"guided": False}, {"step_cache": TaylorForecast()}, {"solver": "heun"}], ids=str
)
@pytest.mark.parametrize("patch_size", [1, 2])
def test_bytes_are_known_beforehand(monkeypatch, at_once, more, patch_size):
    dit = tiny_lumina(patch_size=patch_size)
    if not at_once:
        one_step_at_a_time(monkeypatch)
    for spec in (tiny_spec(4, (1, 2), **more), tiny_spec(2, (2, 2), **more)):
        plan = make_plan(dit, spec)
        held = sum(plan.denoiser.constants().values())
        if plan._cache is not None:
            held += plan._cache.nbytes
        assert dit.plan_bytes(spec) == held


def test_bytes_of_quantized_weights(dit):
    held = make_plan(dit, tiny_spec(tier="fast")).denoiser.constants()["8-bit weights"]
    assert dit.quantized_bytes(torch.device("cpu")) == held


@torch.no_grad()
def test_modulations_are_those_of_the_module(dit):
    spec = tiny_spec(2, (1, 2))
    _, null, cond = inputs_of(spec)
    denoiser = dit.denoiser(spec)
    denoiser.set_condition(null, cond)
    for index, time in enumerate(spec.timesteps):
        rows, scale = denoiser.modulations.of(index, 4)
        for row, condition in enumerate([null[0], null[0], *cond]):
            caption = dit.caption_projection(condition[None])
            embedding = dit.time_caption_embed(torch.tensor([time]), caption)
            active = torch.nn.functional.silu(embedding)
            torch.testing.assert_close(scale[row], dit.norm_out["linear_1"](active)[0])
            for number, block in enumerate(dit.layers):
                torch.testing.assert_close(rows[number, row], block.norm1.linear(active)[0])


def test_the_null_condition_is_prepared_once(dit, monkeypatch):
    spec = tiny_spec(2, (1, 2))
    noise, null, cond = inputs_of(spec)
    plan, calls = make_plan(dit, spec), []
    project = dit.caption_projection.forward
    monkeypatch.setattr(
        dit.caption_projection, "forward", lambda x: calls.append(len(x)) or project(x)
    )
    first = plan.run(noise, null, cond, guidance=2.0)
    other = [torch.randn(9, CAPTION), torch.randn(12, CAPTION)]
    assert not torch.equal(plan.run(noise, null, other, guidance=2.0), first)
    assert calls == [1, 2, 2]
    assert torch.equal(plan.run(noise, null, cond, guidance=2.0), first)


def test_kernels_of_a_step(dit):
    spec = tiny_spec(1, (1, 1))
    plan = make_plan(dit, spec)
    plan.run(*inputs_of(spec), guidance=2.0)
    kernels, blocks = plan.kernels(), len(dit.layers)
    assert kernels["mm"] + kernels["addmm"] == 4 * blocks + 2
    assert kernels["clipflow::sandwich_residual_norm_out"] == 2 * blocks
    assert kernels["clipflow::qk_norm_rope_out"] == 2 * blocks
    assert kernels["clipflow::swiglu_out"] == blocks
    assert kernels["clipflow::adaln_norm_out"] == 2
    text = plan.explain()
    for words in ("rotary table", "keys and values", "activations", "kernels", "faithful"):
        assert words in text


@pytest.mark.parametrize("tier", ["faithful", "fast"])
def test_plans_of_patches(tier):
    dit = tiny_lumina(patch_size=2)
    spec = tiny_spec(2, (1, 2), tier=tier, solver="euler")
    noise, null, cond = inputs_of(spec)
    found = make_plan(dit, spec).run(noise, null, cond, guidance=2.0)
    wanted = reference_run(dit, spec, noise, null, cond, 2.0)
    distance = ((found - wanted).norm() / wanted.norm()).item()
    assert distance < (1e-5 if tier == "faithful" else 5e-2)


@pytest.mark.parametrize("truncate", [True, False])
def test_float_times_and_times_of_1000(dit, truncate):
    schedule = euler_schedule(3, truncate=truncate)
    times = {
        "sigmas": tuple(schedule.sigmas.tolist()),
        "timesteps": tuple(schedule.timesteps.tolist()),
    }
    assert times["timesteps"][0] == 1000
    assert isinstance(times["timesteps"][1], int if truncate else float)
    spec = tiny_spec(2, (1, 2), solver="euler", **times)
    inputs, seen = inputs_of(spec), []
    plan = make_plan(dit, spec)
    found = plan.run(*inputs, guidance=2.0, callback=lambda _, time, __: seen.append(time))
    assert tuple(seen) == spec.timesteps
    exact = copy.deepcopy(dit).double()
    wide = [inputs[0].double(), *([t.double() for t in part] for part in inputs[1:])]
    truth, eager = (
        reference_run(model, spec, *given, 2.0, schedule)
        for model, given in ((exact, wide), (dit, inputs))
    )
    assert (found - truth).norm() <= 2 * (eager - truth).norm()


def test_samples_are_what_they_are_alone(dit):
    """Four pictures of two prompts in one plan, each against a plan of its own."""
    spec = tiny_spec(4, (1, 2))
    noise, null, cond = inputs_of(spec)
    together = make_plan(dit, spec).run(noise, null, cond, guidance=2.0)
    alone = make_plan(dit, tiny_spec(1, (1, 1)))
    for b in range(4):
        found = alone.run(noise[b : b + 1], null, cond[b // 2 : b // 2 + 1], guidance=2.0)
        torch.testing.assert_close(found[0], together[b], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["feed_forward", "attn2.norm_k", "norm1.linear"])
def test_what_a_plan_would_pass_over_is_refused(part):
    dit = tiny_lumina()
    dit.layers[1].get_submodule(part).register_forward_hook(lambda *_: None)
    with pytest.raises(SamplingError, match=rf"1\.{part}"):
        dit.denoiser(tiny_spec())


def test_plans_of_one_model_keep_its_weights():
    """Packing moves weights but changes neither names nor values."""
    dit = tiny_lumina()
    before = copy.deepcopy(dit.state_dict())
    make_plan(dit, tiny_spec())
    SamplingPlan(spec := replace(tiny_spec(), samples=1, conditions=(1, 1)), dit.denoiser(spec))
    after = dit.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
