"""Step caching: what is skipped, what takes its place, and that runs do not mix."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dit import DITS, inputs_of, make_plan, tiny_dit, tiny_spec
from tiny_pipeline import tiny_pipeline

import clipflow
from clipflow import FirstBlockCache, TaylorForecast, ops
from clipflow.errors import InputError, SamplingError
from clipflow.models.dits.lumina import LuminaTransformer
from clipflow.sampling import SamplingPlan
from clipflow.sampling.forecast import forecast_schedule, lagrange_weights

ALWAYS, NEVER = FirstBlockCache(threshold=1e9), FirstBlockCache(threshold=1e-12)


@pytest.fixture(scope="module")
def dit():
    return tiny_dit(layers=3)


@pytest.fixture(scope="module", params=DITS)
def each(request):
    return DITS[request.param](layers=3)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def skipped(cache, steps=8, **more):
    spec = tiny_spec(steps=steps, step_cache=cache, **more)
    return [k for k, entry in enumerate(forecast_schedule(spec)) if not isinstance(entry, int)]


def run(dit, spec, seed=1, **more):
    plan = make_plan(dit, spec)
    return plan.run(*inputs_of(spec, seed), guidance=2.0, **more), plan


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (FirstBlockCache, {"threshold": 0}, "threshold must be a number above 0, got 0"),
        (FirstBlockCache, {"threshold": float("nan")}, "threshold must be a number"),
        (FirstBlockCache, {"threshold": "0.1"}, "threshold must be a number"),
        (FirstBlockCache, {"warm_up": 0}, "warm_up must be a whole number of at least 1, got 0"),
        (TaylorForecast, {"interval": 1}, "interval must be a whole number of at least 2"),
        (TaylorForecast, {"interval": 2.0}, "interval must be a whole number"),
        (TaylorForecast, {"order": 4}, "order must be a whole number from 0 to 3, got 4"),
        (TaylorForecast, {"warm_up": True}, "warm_up must be a whole number"),
    ],
)
def test_configurations_that_cannot_be(kind, values, words):
    with pytest.raises(InputError, match=words):
        kind(**values)


def test_a_cache_is_part_of_the_spec():
    plain, cached = tiny_spec(), tiny_spec(step_cache=TaylorForecast())
    assert plain != cached and cached == tiny_spec(step_cache=TaylorForecast())
    assert len({plain, cached, tiny_spec(step_cache=FirstBlockCache())}) == 3
    assert clipflow.TaylorForecast is TaylorForecast
    with pytest.raises(InputError, match=r"one evaluation a step .* got 'heun'"):
        tiny_spec(solver="heun", step_cache=TaylorForecast())
    with pytest.raises(InputError, match="must be None, a FirstBlockCache or a TaylorForecast"):
        tiny_spec(step_cache="taylor")


def test_the_schedule_of_a_forecast():
    assert skipped(TaylorForecast(interval=2, warm_up=1)) == [1, 3, 5]
    assert skipped(TaylorForecast(interval=2, warm_up=3)) == [3, 5]
    assert skipped(TaylorForecast(interval=3, warm_up=2)) == [2, 3, 5]
    assert skipped(TaylorForecast(interval=3, warm_up=2, cool_down=1)) == [2, 3, 5, 6]
    assert skipped(TaylorForecast(interval=9, warm_up=8)) == []
    assert skipped(TaylorForecast(interval=2, warm_up=1), steps=1) == []
    # Null rows begin in step 3: what is known of them begins there too.
    late = {"guidance_interval": (0.375, 0.75)}
    assert skipped(TaylorForecast(interval=2, warm_up=2), **late) == [2, 5]


def test_weights_of_a_polynomial():
    nodes, at = [0.9, 0.7, 0.4], 0.3
    for order in range(3):
        weights = lagrange_weights(nodes[: order + 1], at)
        for power in range(order + 1):
            found = sum(w * x**power for w, x in zip(weights, nodes, strict=False))
            assert found == pytest.approx(at**power)


class Polynomial:
    """A denoiser whose velocity is one of the step's number, and differs from row to row."""

    def __init__(self, spec, degree):
        self.spec, self.degree, self.calls = spec, degree, []
        self.factors = torch.arange(1.0, spec.rows + 1).view(-1, 1, 1, 1)

    def constants(self):
        return {}

    def set_condition(self, null, cond):
        pass

    def velocity(self, rows, index):
        self.calls.append(index)
        factors, at = self.factors[-len(rows) :], index / len(self.spec.timesteps)
        return torch.ones_like(rows) * sum((factors * at) ** n for n in range(self.degree + 1))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.25, 1.0)])
def test_a_forecast_is_exact_for_polynomials_of_its_order(order, interval):
    cache = TaylorForecast(interval=3, order=order, warm_up=4)
    spec = tiny_spec(steps=16, guidance_interval=interval, step_cache=cache)
    plain = dataclasses.replace(spec, step_cache=None)
    inputs = inputs_of(spec)
    wanted = SamplingPlan(plain, Polynomial(plain, order)).run(*inputs, guidance=2.0)
    plan = SamplingPlan(spec, Polynomial(spec, order))
    torch.testing.assert_close(plan.run(*inputs, guidance=2.0), wanted, atol=1e-4, rtol=1e-4)
    assert len(plan.skipped_steps) >= 4
    assert sorted([*plan.denoiser.calls, *plan.skipped_steps]) == list(range(16))
    more = SamplingPlan(spec, Polynomial(spec, order + 1)).run(*inputs, guidance=2.0)
    exact = SamplingPlan(plain, Polynomial(plain, order + 1)).run(*inputs, guidance=2.0)
    assert not torch.allclose(more, exact, atol=1e-4, rtol=1e-4)


def test_a_model_without_blocks_has_no_first_one():
    spec = tiny_spec(step_cache=ALWAYS)
    with pytest.raises(SamplingError, match="must have a denoiser with blocks, got a Polynomial"):
        SamplingPlan(spec, Polynomial(spec, 1))


@pytest.mark.parametrize("tier", ["faithful", "fast"])
def test_first_block_cache_that_never_skips_changes_nothing(each, tier):
    spec = tiny_spec(steps=5, tier=tier, guidance_interval=(0.2, 0.8))
    wanted, plain = run(each, spec)
    found, plan = run(each, dataclasses.replace(spec, step_cache=NEVER))
    assert torch.equal(found, wanted) and plan.skipped_steps == plain.skipped_steps == ()


@pytest.mark.parametrize("tier", ["faithful", "fast"])
def test_a_skipped_step_takes_the_rest_of_the_last_computed_one(each, tier):
    spec = tiny_spec(steps=4, tier=tier, step_cache=FirstBlockCache(threshold=1e9, warm_up=2))
    plan, velocities = make_plan(each, spec), []
    velocity = plan._cache.velocity
    plan._cache.velocity = lambda x, k: velocities.append(velocity(x, k).clone()) or velocities[-1]
    seen = []
    begin = plan.denoiser.begin
    plan.denoiser.begin = lambda x, k: seen.append((x.clone(), k)) or begin(x, k)
    plan.run(*inputs_of(spec), guidance=2.0)
    assert plan.skipped_steps == (2, 3)

    denoiser = make_plan(each, dataclasses.replace(spec, step_cache=None)).denoiser
    denoiser.set_condition(*inputs_of(spec)[1:])
    parts = []
    for rows, index in seen:
        stream = denoiser.begin(rows, index)
        denoiser.advance(stream, 0, 1)
        first = stream.hidden.clone()
        denoiser.advance(stream, 1, denoiser.depth)
        parts.append((first, stream.hidden - first))
    for index in (2, 3):
        wanted = output_of(each, denoiser, parts[index][0] + parts[1][1], index)
        wanted = wanted.transpose(1, 2).unflatten(2, spec.latent_shape[1:])
        torch.testing.assert_close(velocities[index], wanted, atol=2e-5, rtol=1e-4)


def output_of(dit, denoiser, hidden, index):
    """What the ends of `dit` make of the residual stream [R, N, D] in evaluation `index`."""
    if isinstance(dit, LuminaTransformer):
        _, scale = denoiser.modulations.of(index, len(hidden))
        return dit.norm_out["linear_2"](ops.adaln_norm(hidden, None, scale, eps=1e-6))
    embedding = denoiser.embedding[index].expand(len(hidden), -1)
    table = denoiser.out_table
    return dit.proj_out(ops.adaln_norm(hidden, embedding, embedding, table=table, eps=1e-6))


def test_the_threshold_decides(each):
    """The change that is compared is that of the first block's residual, over all rows."""
    spec = tiny_spec(steps=3, step_cache=NEVER)
    residuals, plan = [], make_plan(each, spec)
    advance = plan.denoiser.advance

    def watched(stream, begin, end):
        before = stream.hidden.clone()
        advance(stream, begin, end)
        if begin == 0:
            residuals.append(stream.hidden - before)

    plan.denoiser.advance = watched
    plan.run(*inputs_of(spec), guidance=2.0)
    change = ((residuals[1] - residuals[0]).abs().mean() / residuals[0].abs().mean()).item()
    for factor, wanted in ((0.99, False), (1.01, True)):
        cache = FirstBlockCache(threshold=change * factor)
        _, plan = run(each, dataclasses.replace(spec, step_cache=cache))
        assert (1 in plan.skipped_steps) is wanted


def test_null_rows_that_are_not_known_are_computed(each):
    spec = tiny_spec(steps=6, step_cache=ALWAYS, guidance_interval=(0.5, 0.7))
    found, plan = run(each, spec)
    assert plan.skipped_steps == (1, 2, 4, 5)
    assert found.isfinite().all()


@pytest.mark.parametrize("cache", [ALWAYS, TaylorForecast(interval=2, warm_up=1)])
def test_runs_of_one_plan_do_not_mix(each, cache):
    spec = tiny_spec(steps=5, step_cache=cache, guidance_interval=(0.3, 1.0))
    first, plan = run(each, spec)
    steps = plan.skipped_steps
    plan.run(*inputs_of(spec, seed=7), guidance=5.0)
    again = plan.run(*inputs_of(spec), guidance=2.0, callback=lambda *_: None)
    assert torch.equal(again, first) and plan.skipped_steps == steps
    plain, _ = run(each, dataclasses.replace(spec, step_cache=None))
    distance = (first - plain).norm() / plain.norm()
    assert 0 < distance < 0.5


@pytest.mark.parametrize("cache", [ALWAYS, NEVER, TaylorForecast(interval=2, warm_up=1)])
def test_a_cached_step_allocates_nothing(each, monkeypatch, cache):
    spec = tiny_spec(2, (2, 2), steps=4, step_cache=cache)
    plan = make_plan(each, spec)
    plan.run(*inputs_of(spec), guidance=2.0)
    monkeypatch.setattr(ops, "dit_attention", lambda q, *_, **__: q)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as log:
        plan._evaluate(1)
        plan._evaluate(2)
    assert sum(max(0, event.self_cpu_memory_usage) for event in log.key_averages()) == 0


@pytest.mark.parametrize("cache", [FirstBlockCache(), TaylorForecast(order=2)])
def test_a_plan_names_its_cache_and_counts_its_bytes(each, cache):
    plain = tiny_spec()
    spec = dataclasses.replace(plain, step_cache=cache)
    _, plan = run(each, spec)
    text = plan.explain()
    assert str(cache) in text and "step cache" in text
    more = each.plan_bytes(spec) - each.plan_bytes(plain)
    assert more <= plan._cache.nbytes <= more + 8
    assert plan.nbytes == sum(plan._held().values()) > each.plan_bytes(plain)


def dice(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_pictures_report_what_was_skipped(pipe):
    texts = ["a red circle", "two blue stars", "a green ring"]
    options = {"num_inference_steps": 4, "output_type": "latent"}
    assert pipe(texts[0], **options).skipped_steps == ()
    taylor = TaylorForecast(interval=2, warm_up=1)
    out = pipe(texts, generator=dice(0, 1, 2), step_cache=taylor, **options)
    assert out.skipped_steps == ((1,),) * 3
    # Runs decide by themselves: two kinds of pictures here.
    out = pipe(texts, step_cache=ALWAYS, guidance_scale=[2.0, 1.0, 2.0], **options)
    assert out.skipped_steps == ((1, 2, 3),) * 3
    picture = Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8))
    out = pipe.edit(picture, "remove the star", step_cache=ALWAYS, **options)
    assert out.skipped_steps == ((1, 2, 3),)
    assert len(pipe(texts[0], step_cache=ALWAYS, return_dict=False, **options)) == 1


@pytest.mark.parametrize("cache", [FirstBlockCache(threshold=0.3), TaylorForecast(warm_up=1)])
def test_batch_invariant_pictures_are_cached_alone(pipe, cache):
    texts = ["a red circle", "two blue stars", "a green ring"]
    options = {
        "num_inference_steps": 6,
        "output_type": "latent",
        "step_cache": cache,
        "batch_invariant": True,
    }
    batch = pipe(texts, generator=dice(0, 1, 2), **options)
    for k, text in enumerate(texts):
        alone = pipe(text, generator=dice(k), **options)
        assert torch.equal(alone.images[0], batch.images[k])
        assert alone.skipped_steps[0] == batch.skipped_steps[k] != ()


def test_calls_refuse_other_caches(pipe):
    with pytest.raises(InputError, match="step_cache must be None, a FirstBlockCache or a Taylor"):
        pipe("a star", step_cache="taylor")
    with pytest.raises(InputError, match="one evaluation a step"):
        pipe("a star", step_cache=TaylorForecast(), solver="heun")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache", [FirstBlockCache(threshold=0.3), TaylorForecast(warm_up=1)])
@pytest.mark.parametrize("kind", DITS)
def test_caches_on_a_gpu(cache, kind):
    dit = DITS[kind](layers=3).cuda()
    spec = tiny_spec(steps=6, device=torch.device("cuda", 0), step_cache=cache)
    noise, null, cond = inputs_of(spec)
    inputs = noise.cuda(), [t.cuda() for t in null], [t.cuda() for t in cond]
    plan = make_plan(dit, spec)
    assert plan._graphs.usable == isinstance(cache, TaylorForecast)
    whole, steps = plan.run(*inputs, guidance=2.0), plan.skipped_steps
    assert torch.equal(whole, plan.run(*inputs, guidance=2.0, callback=lambda *_: None))
    eager = make_plan(dit, spec)
    eager._graphs.usable = False
    assert torch.equal(whole, eager.run(*inputs, guidance=2.0))
    assert plan.skipped_steps == eager.skipped_steps == steps
