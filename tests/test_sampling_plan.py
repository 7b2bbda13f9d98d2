"""Plans give what the module gives when it is called in every step; constants, buffers, faults."""

import copy

import pytest
import torch
from tiny_dit import CAPTION, DITS, inputs_of, make_plan, reference_run, tiny_dit, tiny_spec

from clipflow import ops
from clipflow.errors import SamplingError, ShapeError
from clipflow.models.dits import condition_keys
from clipflow.models.dits.linears import QuantizedLinear
from clipflow.models.dits.lumina import LuminaTransformer
from clipflow.sampling.tracing import kernels_of


@pytest.fixture(scope="module")
def dit():
    return tiny_dit()


@pytest.fixture(scope="module", params=DITS)
def each(request):
    return DITS[request.param]()


def error(found, truth):
    return (found.double() - truth).norm().item() / truth.norm().item()


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler", "heun"])
@pytest.mark.parametrize(
    ("samples", "conditions", "guided"),
    [(1, (1, 1), True), (4, (1, 2), True), (3, (3, 3), True), (2, (0, 2), False)],
)
def test_a_plan_is_as_exact_as_the_module(each, solver, samples, conditions, guided):
    spec = tiny_spec(samples, conditions, guided=guided, solver=solver)
    scale = 4.5 if guided else 1.0
    noise, null, cond = inputs_of(spec)
    found = make_plan(each, spec).run(noise, null, cond, guidance=scale)
    eager = reference_run(each, spec, noise, null, cond, scale)
    wide = [t.double() for t in null], [t.double() for t in cond]
    truth = reference_run(copy.deepcopy(each).double(), spec, noise.double(), *wide, scale)
    assert error(found, truth) <= 2 * error(eager, truth) + 1e-7


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 1.0)])
def test_null_and_cond_rows_may_attend_together(each, interval, monkeypatch):
    spec = tiny_spec(4, (2, 2), guidance_interval=interval)
    noise, null, cond = inputs_of(spec)
    apart = make_plan(each, spec).run(noise, null, cond, guidance=3.0)
    monkeypatch.setattr(condition_keys, "attend_together", lambda spec: True)
    plan = make_plan(each, spec)
    together = plan.run(noise, null, cond, guidance=3.0)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    kernels, blocks = plan.kernels(), plan.denoiser.depth
    products = 4 * blocks + 2 if isinstance(each, LuminaTransformer) else 6 * blocks
    assert kernels["addmm"] + kernels["mm"] == products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plan_in_half_precision(each, dtype):
    half = copy.deepcopy(each).to(dtype)
    spec = tiny_spec(dtype=dtype)
    noise, null, cond = inputs_of(spec)
    found = make_plan(half, spec).run(
        noise, [t.to(dtype) for t in null], [t.to(dtype) for t in cond], guidance=2.0
    )
    truth = reference_run(each, spec, noise, null, cond, 2.0)
    assert found.dtype == torch.float32
    assert error(found, truth.double()) < 3e-2


def test_each_sample_has_its_own_guidance(each):
    spec = tiny_spec(2, (1, 2))
    noise, null, cond = inputs_of(spec)
    plan = make_plan(each, spec)
    both = plan.run(noise, null, cond, guidance=torch.tensor([1.5, 6.0]))
    torch.testing.assert_close(both[0], plan.run(noise, null, cond, guidance=1.5)[0])
    torch.testing.assert_close(both[1], plan.run(noise, null, cond, guidance=6.0)[1])
    assert not torch.allclose(both[0], plan.run(noise, null, cond, guidance=6.0)[0])


def test_no_null_rows_outside_the_guidance_interval(each):
    spec = tiny_spec(2, (1, 2), steps=4, guidance_interval=(0.25, 0.75))
    noise, null, cond = inputs_of(spec)
    plan, rows = make_plan(each, spec), []
    velocity = plan.denoiser.velocity
    plan.denoiser.velocity = lambda x, k: rows.append(len(x)) or velocity(x, k)
    found = plan.run(noise, null, cond, guidance=3.0)
    assert rows == [2, 4, 4, 2]

    # The same by switching the module's guidance off by hand.
    whole = make_plan(each, tiny_spec(2, (1, 2), steps=4))
    whole_velocity, step = whole.denoiser.velocity, []

    def unguided_outside(x, k):
        v = whole_velocity(x, k)
        step.append(k)
        return v if k in (1, 2) else torch.cat([v[2:], v[2:]])

    whole.denoiser.velocity = unguided_outside
    wanted = whole.run(noise, null, cond, guidance=3.0)
    assert step == [0, 1, 2, 3]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_modulations_of_all_steps_are_those_of_each_step(dit):
    spec = tiny_spec(steps=5)
    denoiser = dit.denoiser(spec)
    for index, time in enumerate(spec.timesteps):
        modulation, embedding = dit.time_embed(torch.tensor([time]))
        assert torch.equal(denoiser.modulation[index], modulation[0])
        assert torch.equal(denoiser.embedding[index], embedding[0])
        for number, block in enumerate(dit.transformer_blocks):
            gate = block.scale_shift_table[2] + modulation[0, 2]
            assert torch.equal(denoiser.gates[index, number, 0], gate)


def test_heun_asks_at_the_next_level(dit):
    spec = tiny_spec(solver="heun", steps=3)
    modulation = dit.denoiser(spec).modulation
    assert len(modulation) == 5
    assert torch.equal(modulation[1], modulation[2]) and not torch.equal(
        modulation[0], modulation[1]
    )


def test_conditions_are_prepared_once(dit, monkeypatch):
    spec = tiny_spec(2, (1, 2))
    noise, null, cond = inputs_of(spec)
    plan, calls = make_plan(dit, spec), []
    embed = dit.embed_condition
    monkeypatch.setattr(dit, "embed_condition", lambda x: calls.append(len(x)) or embed(x))
    first = plan.run(noise, null, cond, guidance=2.0)
    assert calls == [1, 2]
    assert torch.equal(plan.run(noise, null, cond, guidance=2.0), first)
    assert calls == [1, 2], "the same tensors again are not prepared again"
    other = [torch.randn(9, CAPTION), torch.randn(12, CAPTION)]
    assert not torch.equal(plan.run(noise, null, other, guidance=2.0), first)
    assert calls == [1, 2, 2], "the null branch is kept"
    null[0].mul_(2)
    plan.run(noise, null, other, guidance=2.0)
    assert calls == [1, 2, 2, 1], "a tensor that was written is prepared again"


def test_only_attention_allocates_after_the_first_step(each, monkeypatch):
    """PyTorch's attention has no out=; with a stand-in that allocates nothing, nothing does."""
    spec = tiny_spec(2, (2, 2), steps=4)
    plan = make_plan(each, spec)
    plan.run(*inputs_of(spec), guidance=2.0)
    monkeypatch.setattr(ops, "dit_attention", lambda q, *_, **__: q)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as log:
        plan._evaluate(1)
        torch.empty(1000)
    allocating = {e.key: e.self_cpu_memory_usage for e in log.key_averages()}
    allocating = {name: size for name, size in allocating.items() if size > 0}
    assert allocating == {"aten::empty": 4000}, "but for the allocation that shows it would be seen"


def test_kernels_of_a_step_and_explain(dit):
    spec = tiny_spec(1, (1, 1))
    plan = make_plan(dit, spec)
    plan.run(*inputs_of(spec), guidance=2.0)
    kernels = plan.kernels()
    blocks = len(dit.transformer_blocks)
    assert kernels["clipflow::linear_attention_out"] == kernels["clipflow::glu_conv_out"] == blocks
    assert kernels["clipflow::gated_residual_norm_out"] == 2 * blocks
    assert kernels["mm"] + kernels["addmm"] == 7 * blocks
    text = plan.explain()
    for words in ("modulations of all steps", "keys and values", "kernels", "dpmpp_2m", "faithful"):
        assert words in text
    assert kernels_of(lambda: torch.ones(2).view(1, 2) + 1) == {"ones": 1, "add": 1}


def test_callback_sees_each_step_and_may_replace_the_latents(each):
    spec = tiny_spec(2, (1, 2), steps=3)
    plan, seen, bar = make_plan(each, spec), [], []

    def callback(step, timestep, latents):
        seen.append((step, timestep, latents))
        return torch.zeros_like(latents) if step == 2 else None

    found = plan.run(*inputs_of(spec), guidance=2.0, callback=callback, progress=bar.append)
    assert [(step, time) for step, time, _ in seen] == list(enumerate(spec.timesteps))
    assert not found.any() and bar == [1, 1, 1]
    assert not torch.equal(seen[0][2], seen[1][2]), "each step's latents are the callback's own"


def test_replaced_latents_are_what_the_model_sees_next(each):
    spec = tiny_spec(2, (1, 2), steps=3, solver="euler")
    plan = make_plan(each, spec)
    inputs = inputs_of(spec)
    mark = torch.randn(2, *spec.latent_shape)
    seen, velocity = [], plan.denoiser.velocity
    plan.denoiser.velocity = lambda x, k: seen.append(x.clone()) or velocity(x, k)
    plan.run(*inputs, guidance=2.0, callback=lambda step, *_: mark if step == 0 else None)
    assert torch.equal(seen[1], torch.cat([mark, mark]))


@pytest.mark.parametrize("bad_step", [0, 2])
def test_latents_that_are_not_finite_are_named(each, bad_step):
    spec = tiny_spec(2, (1, 2), steps=4, solver="euler")
    plan = make_plan(each, spec)
    velocity = plan.denoiser.velocity
    plan.denoiser.velocity = lambda x, k: velocity(x, k) * (float("nan") if k == bad_step else 1)
    with pytest.raises(SamplingError, match=rf"step {bad_step + 1} of 4.*faithful.*auto"):
        plan.run(*inputs_of(spec), guidance=2.0)
    plan.denoiser.velocity = velocity
    assert plan.run(*inputs_of(spec), guidance=2.0).isfinite().all(), "the plan is usable again"


def test_wrong_inputs_are_refused(each):
    spec = tiny_spec(2, (1, 2))
    noise, null, cond = inputs_of(spec)
    plan = make_plan(each, spec)
    with pytest.raises(ShapeError, match="noise must be"):
        plan.run(noise[:1], null, cond)
    with pytest.raises(ShapeError, match="conditions"):
        plan.run(noise, [], cond)
    with pytest.raises(ShapeError, match="at most 32 tokens, got 33"):
        plan.run(noise, null, [torch.randn(33, CAPTION)] * 2)


@pytest.mark.parametrize("part", ["hook", "class", "forward"])
def test_what_a_plan_would_pass_over_is_refused(part):
    dit = tiny_dit()
    attention = dit.transformer_blocks[1].attn1
    if part == "hook":
        attention.register_forward_hook(lambda *_: None)
    elif part == "class":
        attention.to_q = torch.nn.Sequential(attention.to_q)
    else:
        attention.forward = lambda tokens: tokens
    with pytest.raises(SamplingError, match=r"1\.attn1"):
        dit.denoiser(tiny_spec())


def test_the_fast_tier_is_close_and_shares_its_weights(each):
    spec = tiny_spec(2, (1, 2), tier="fast")
    inputs = inputs_of(spec)
    plan, other = make_plan(each, spec), make_plan(each, spec)
    exact = make_plan(each, tiny_spec(2, (1, 2)))
    for one in (plan, exact):
        one.denoiser.set_condition(*inputs[1:])
    rows = torch.cat([inputs[0], inputs[0]])
    truth = exact.denoiser.velocity(rows, 1).clone()
    distance = error(plan.denoiser.velocity(rows, 1), truth.double())
    assert 1e-5 < distance < 3e-2
    block, same = plan.denoiser.blocks[0], other.denoiser.blocks[0]
    first, second = (getattr(b, "qkv", None) or b.inward for b in (block, same))
    assert isinstance(first, QuantizedLinear) and first is second
    assert not isinstance(block.key_value, QuantizedLinear)
    assert "8-bit weights" in plan.explain() and plan.nbytes > exact.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", DITS)
def test_graphs_give_what_single_launches_give(kind):
    dit = DITS[kind]().cuda()
    spec = tiny_spec(2, (1, 2), device=torch.device("cuda", 0))
    noise, null, cond = inputs_of(spec)
    inputs = noise.cuda(), [t.cuda() for t in null], [t.cuda() for t in cond]
    plan = make_plan(dit, spec)
    whole = plan.run(*inputs, guidance=2.0)
    stepwise = plan.run(*inputs, guidance=2.0, callback=lambda *_: None)
    eager = make_plan(dit, spec)
    eager._graphs.usable = False
    assert torch.equal(whole, stepwise)
    assert torch.equal(whole, eager.run(*inputs, guidance=2.0))
