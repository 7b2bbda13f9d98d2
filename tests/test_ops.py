"""Every registered op, on every backend, at every promised case: the contract in one file."""

import pytest
import torch
from op_calls import (
    DEVICES,
    assert_as_close_as_eager,
    backends_under_test,
    outputs,
    results,
    run,
)

from clipflow import extension
from clipflow.ops import all_ops
from clipflow.registry import TRITON_INTERPRETED

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# In the inputs of a case: the float64 truth of more takes up to half a minute. benchmarks/ops.py
# compares every timed size with it before it times.
MOST_NUMBERS = 2**23
dtype_name = lambda d: str(d).removeprefix("torch.")  # noqa: E731


def first_timed(op):
    return op.timed[:1]


def largest_timed(op):
    """The largest timed case of at most `MOST_NUMBERS`."""

    def numbers(case):
        return sum(t.numel() for t in case.inputs(torch.device("meta"), torch.float32))

    return [max((c for c in op.timed if numbers(c) <= MOST_NUMBERS), key=numbers)]


def grid(cases=slice(None), only=lambda op: True, timed=None):
    """(op, case, backend, device) wherever a backend other than eager is willing."""
    return [
        pytest.param(op, case, backend, device, id=f"{op.name}-{case.name}-{backend}-{device}")
        for op in all_ops()
        if only(op)
        for case in (timed(op) if timed else op.cases[cases])
        if not (timed and TRITON_INTERPRETED)  # minutes each
        for device in DEVICES
        for backend in backends_under_test(op)
        if op.refusal(torch.empty(1, device=device), backend) is None
    ]


def parametrize(*args, **kwargs):
    return pytest.mark.parametrize(("op", "case", "backend", "device"), grid(*args, **kwargs))


every_case = parametrize()
one_case = parametrize(slice(1, 2))


def inputs_or_skip(op, case, backend, device, dtype):
    inputs = case.inputs(device, dtype)
    if op.refusal(inputs[0], backend):
        pytest.skip(f"{backend} {op.refusal(inputs[0], backend)}")
    return inputs


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_output_and_gradients_are_as_close_as_eager(op, case, backend, device, dtype):
    inputs = inputs_or_skip(op, case, backend, device, dtype)
    actual = results(op, case, inputs, backend)
    eager = results(op, case, inputs, "eager")
    assert {k: (t.dtype, t.shape) for k, t in actual.items()} == {
        k: (t.dtype, t.shape) for k, t in eager.items()
    }
    assert all(t.is_contiguous() for name, t in actual.items() if name.startswith("y"))
    # The interpreter cuts float32 to bfloat16 where every other device rounds.
    steps = 4 if TRITON_INTERPRETED and dtype == torch.bfloat16 else 1
    assert_as_close_as_eager(actual, op, case, inputs, steps)


@parametrize(timed=largest_timed)
def test_a_large_timed_size(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    assert_as_close_as_eager(results(op, case, inputs, backend), op, case, inputs)


@parametrize(only=lambda op: op.exact)
def test_exact_ops_have_the_bits_of_eager(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    eager = outputs(op, run(op, case, inputs, "eager"))
    for name, value in outputs(op, run(op, case, inputs, backend)).items():
        if TRITON_INTERPRETED and value.dtype == torch.bfloat16:  # cut instead of rounded
            torch.testing.assert_close(value, eager[name], rtol=2**-7, atol=0)
        else:
            assert torch.equal(value, eager[name]), name


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_every_instruction_set_of_this_machine(op, name, dtype):
    if not extension.LOADED or name not in extension.build_facts()["instruction_sets"]:
        pytest.skip("not compiled for it")
    cpu = torch.device("cpu")
    if "native" not in op.backends or op.refusal(torch.empty(1, dtype=dtype), "native"):
        pytest.skip("no compiled kernel for this dtype on the CPU")
    best = extension.build_facts()["instruction_set"]
    if not extension._C.use_instruction_set(name):
        pytest.skip(f"this machine does not run {name}")
    try:
        for case in op.cases[1:5]:
            inputs = case.inputs(cpu, dtype)
            assert_as_close_as_eager(results(op, case, inputs, "native"), op, case, inputs)
    finally:
        extension._C.use_instruction_set(best)


@every_case
def test_no_grad_gives_the_same_output(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    with torch.no_grad():
        silent = outputs(op, run(op, case, inputs, backend))
    leaves = tuple(t.clone().requires_grad_(op.differentiable) for t in inputs)
    recorded = outputs(op, run(op, case, leaves, backend))
    assert recorded["y_0"].requires_grad == op.differentiable
    for name, value in silent.items():
        assert torch.equal(value, recorded[name]), name


@one_case
def test_empty_batch(op, case, backend, device):
    inputs = tuple(
        t if i in case.shared else t[:0] for i, t in enumerate(case.inputs(device, torch.float32))
    )
    if any(isinstance(v, torch.Tensor) and v.ndim for v in case.options(device).values()):
        inputs = case.inputs(device, torch.float32)  # options belong to the samples
    actual, eager = results(op, case, inputs, backend), results(op, case, inputs, "eager")
    assert {k: t.shape for k, t in actual.items()} == {k: t.shape for k, t in eager.items()}
    for name, value in actual.items():
        assert not value.isnan().any(), name


@every_case
def test_strided_inputs_give_the_same_bits(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    strided = tuple(t.repeat_interleave(2, dim=-1)[..., ::2] for t in inputs)
    assert not strided[0].is_contiguous()
    contiguous = results(op, case, inputs, backend)
    for name, value in results(op, case, strided, backend).items():
        assert torch.equal(value, contiguous[name]), name


@parametrize(slice(0, 2))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
# Kernels compute all dtypes in float32; in the interpreter each takes minutes.
@pytest.mark.parametrize("dtype", DTYPES[: 1 if TRITON_INTERPRETED else 3], ids=dtype_name)
def test_nan_and_inf_come_out_where_eager_has_them(op, case, backend, device, dtype, bad):
    clean = inputs_or_skip(op, case, backend, device, dtype)
    for position in range(len(clean)):
        inputs = tuple(t.clone() for t in clean)
        inputs[position].view(-1)[-1] = bad
        actual, eager = results(op, case, inputs, backend), results(op, case, inputs, "eager")
        for name in actual:
            if name.startswith("y"):
                torch.testing.assert_close(
                    actual[name], eager[name], rtol=0.1, atol=0.1, equal_nan=True
                )
            # inf - inf in a gradient depends on the order of its terms
            assert torch.equal(actual[name].isfinite(), eager[name].isfinite()), (position, name)


@pytest.mark.parametrize(
    ("op", "case", "backend", "device"),
    [
        *grid(slice(1, None), only=lambda op: op.batch_invariant),
        *grid(only=lambda op: op.batch_invariant, timed=first_timed),
    ],
)
def test_bits_do_not_depend_on_batch_or_threads(op, case, backend, device, two_threads):
    inputs = case.inputs(device, torch.float32)
    ys = outputs(op, run(op, case, inputs, "eager"))
    together = results(op, case, inputs, backend, d_y=ys)
    if not TRITON_INTERPRETED:  # the interpreter has one thread
        torch.set_num_threads(1)
        for name, value in results(op, case, inputs, backend, d_y=ys).items():
            assert torch.equal(value, together[name]), name
    if any(isinstance(v, torch.Tensor) and v.ndim for v in case.options(device).values()):
        return  # options of all samples do not go with one
    shared = {f"d_{i}" for i in case.shared}
    for sample in range(ys["y_0"].shape[0]):
        one = slice(sample, sample + 1)
        single = tuple(t if i in case.shared else t[one] for i, t in enumerate(inputs))
        alone = results(op, case, single, backend, d_y={k: y[one] for k, y in ys.items()})
        for name in alone.keys() - shared:
            assert torch.equal(alone[name], together[name][one]), (name, sample)


@parametrize(only=lambda op: op.differentiable)
def test_gradients_against_finite_differences(op, case, backend, device):
    inputs = inputs_or_skip(op, case, backend, device, torch.float64)
    if inputs[0].numel() > 8000:
        pytest.skip("too large for finite differences")
    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    torch.autograd.gradcheck(lambda *t: run(op, case, t, backend), leaves, fast_mode=True)


@parametrize(slice(1, 2), only=lambda op: op.differentiable)
def test_a_second_derivative_is_refused_not_wrong(op, case, backend, device):
    if op.backends[backend].backward is None:
        pytest.skip("PyTorch's own kernel: its gradients are PyTorch's")
    leaves = tuple(t.clone().requires_grad_() for t in case.inputs(device, torch.float32))
    ys = outputs(op, run(op, case, leaves, backend))
    d_x = torch.autograd.grad(ys["y_0"].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x[0].sum().backward()
