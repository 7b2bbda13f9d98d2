"""Plans are kept within a budget, belong to one thread at a time, and follow the weights."""

import threading

import pytest
import torch
from tiny_dit import inputs_of, reference_run, tiny_dit, tiny_spec

from clipflow.errors import NotEnoughMemory
from clipflow.nn.packing import packed
from clipflow.sampling import PlanCache, memory


@pytest.fixture
def dit():
    return tiny_dit()


def run(cache, spec, seed=1):
    with cache.lease(spec) as plan:
        return plan.run(*inputs_of(spec, seed), guidance=2.0)


def test_equal_specs_share_a_plan(dit):
    cache = PlanCache(dit)
    with cache.lease(tiny_spec()) as first:
        pass
    with cache.lease(tiny_spec()) as again, cache.lease(tiny_spec()) as second:
        assert again is first and second is not first, "a plan in use is not lent twice"
    with cache.lease(tiny_spec(steps=5)) as other:
        assert other is not first
    assert len(cache.plans()) == 3
    cache.clear()
    assert cache.plans() == [] and cache.nbytes == 0


def test_the_plan_used_longest_ago_goes_first(dit):
    cache = PlanCache(dit)
    for steps in (2, 3, 4):
        run(cache, tiny_spec(steps=steps))
    run(cache, tiny_spec(steps=2))
    cache.max_bytes = cache.nbytes
    run(cache, tiny_spec(steps=5))
    steps = [len(plan.spec.timesteps) for plan in cache.plans()]
    assert 3 not in steps and steps[-2:] == [2, 5]
    assert cache.nbytes <= cache.max_bytes
    cache.max_bytes = 0
    run(cache, tiny_spec(steps=6))
    assert cache.plans() == [], "a plan over the budget runs, and is not kept"


def test_plans_follow_the_weights(dit):
    cache, spec = PlanCache(dit), tiny_spec()
    inputs = inputs_of(spec)
    before = run(cache, spec)
    with torch.no_grad():
        dit.transformer_blocks[0].attn1.to_k.weight.mul_(1.5)
        dit.time_embed.linear.weight.mul_(1.5)
    after = run(cache, spec)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, reference_run(dit, spec, *inputs, 2.0), atol=1e-4, rtol=1e-4)
    dit.load_state_dict({name: tensor * 0.5 for name, tensor in dit.state_dict().items()})
    torch.testing.assert_close(
        run(cache, spec), reference_run(dit, spec, *inputs, 2.0), atol=1e-4, rtol=1e-4
    )
    dit.double().float()
    assert torch.equal(run(cache, spec), run(cache, spec))
    assert len(cache.plans()) == 1


def test_packing_keeps_the_state_dict_and_nothing_twice(dit, tmp_path):
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    attention = dit.transformer_blocks[0].attn1
    run(PlanCache(dit), tiny_spec())
    after = dit.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    weights = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    block = packed(weights)
    assert torch.equal(block, torch.cat([weight.detach() for weight in weights]))
    optimizer = torch.optim.SGD(dit.parameters(), lr=0.1)
    weights[1].grad = torch.ones_like(weights[1])
    optimizer.step()
    assert torch.equal(packed(weights), torch.cat([weight.detach() for weight in weights]))
    assert packed(weights).data_ptr() == block.data_ptr()
    assert torch.equal(block[96:192], before["transformer_blocks.0.attn1.to_k.weight"] - 0.1)


def test_a_run_that_fails_gives_its_plan_back(dit):
    cache, spec = PlanCache(dit), tiny_spec()
    wanted = run(cache, spec)
    for error in (ValueError, KeyboardInterrupt):

        def fail(step, timestep, latents, error=error):
            raise error

        with pytest.raises(error), cache.lease(spec) as plan:
            plan.run(*inputs_of(spec), guidance=2.0, callback=fail)
        assert cache.plans() == [] and cache.nbytes == 0
        assert torch.equal(run(cache, spec), wanted)


def test_what_does_not_fit_is_refused_before_it_is_allocated(dit, monkeypatch):
    cache, spec = PlanCache(dit), tiny_spec()
    with cache.lease(spec) as plan:
        held = plan.nbytes - plan.loop.nbytes
    assert dit.plan_bytes(spec) == pytest.approx(held, rel=0.02)
    cache.clear()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(dit, "denoiser", lambda spec: pytest.fail("allocated"))
    with pytest.raises(NotEnoughMemory, match=r"GiB on cpu, and 0\.00 GiB are free"):
        run(cache, spec)


def test_available_memory_is_known_here():
    free = memory.available_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_threads_get_their_own_buffers_and_right_results(dit):
    cache, spec = PlanCache(dit), tiny_spec(steps=6)
    wanted = [run(cache, spec, seed) for seed in range(4)]
    found, barrier = {}, threading.Barrier(4)

    def work(seed):
        barrier.wait()
        for _ in range(3):
            found.setdefault(seed, []).append(run(cache, spec, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert all(torch.equal(latents, wanted[seed]) for latents in found[seed])
    assert 1 <= len(cache.plans()) <= 4
