"""Every registered op, on every backend, at every promised case: the contract in one file."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import DEVICES, Recorder, assert_as_close_as_eager, results, run
from torch._dynamo.testing import CompileCounter

from clipflow import extension, ops
from clipflow.errors import BackendUnavailable, ShapeError
from clipflow.ops import all_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def grid(cases=slice(None), large=False):
    """(op, case, backend, device) wherever a backend other than eager is willing."""
    return [
        pytest.param(op, case, backend, device, id=f"{op.name}-{case.name}-{backend}-{device}")
        for op in all_ops()
        for case in op.cases[cases]
        if case.large == large
        for device in DEVICES
        for backend in op.order
        if backend != "eager" and op.refusal(torch.empty(1, device=device), backend) is None
    ]


every_case = pytest.mark.parametrize(("op", "case", "backend", "device"), grid())
small_case = pytest.mark.parametrize(("op", "case", "backend", "device"), grid(slice(0, 3)))
one_case = pytest.mark.parametrize(("op", "case", "backend", "device"), grid(slice(1, 2)))


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_output_and_gradients_are_as_close_as_eager(op, case, backend, device, dtype):
    inputs = case.inputs(device, dtype)
    if op.refusal(inputs[0], backend):
        pytest.skip(f"{backend} {op.refusal(inputs[0], backend)}")
    actual = results(op, case, inputs, backend)
    assert all(t.dtype == dtype for t in actual.values())
    assert actual["y"].is_contiguous()
    assert_as_close_as_eager(actual, op, case, inputs)


@pytest.mark.parametrize(("op", "case", "backend", "device"), grid(large=True))
def test_large_cases(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    assert_as_close_as_eager(results(op, case, inputs, backend), op, case, inputs)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_instruction_set_of_this_machine(name, dtype):
    if not extension.LOADED or name not in extension.build_facts()["instruction_sets"]:
        pytest.skip("not compiled for it")
    best = extension.build_facts()["instruction_set"]
    if not extension._C.use_instruction_set(name):
        pytest.skip(f"this machine does not run {name}")
    try:
        for op in all_ops():
            for case in op.cases[1:5]:
                inputs = case.inputs(torch.device("cpu"), dtype)
                assert_as_close_as_eager(results(op, case, inputs, "native"), op, case, inputs)
    finally:
        extension._C.use_instruction_set(best)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_conversions_are_those_of_pytorch(name, dtype):
    """Standardizing with mean 0 and std 1 only converts: every value there is, to and fro."""
    if not extension.LOADED:
        pytest.skip("there is no compiled extension")
    best = extension.build_facts()["instruction_set"]
    if not extension._C.use_instruction_set(name):
        pytest.skip(f"this machine does not run {name}")
    try:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1024, 64)
        unit = {"mean": torch.zeros(64), "std": torch.ones(64)}
        same = ops.clip_normalize(values, mode="standardize", **unit, backend="native")
        torch.testing.assert_close(same, values, rtol=0, atol=0, equal_nan=True)
        # Halves, quarters and so on between the values: ties and what lies beside them.
        unit["std"] = 2.0 ** torch.linspace(-8, 8, 64) * 1.0625
        scaled = ops.clip_normalize(values, mode="standardize", **unit, backend="native")
        eager = ops.clip_normalize(values, mode="standardize", **unit, backend="eager")
        torch.testing.assert_close(scaled, eager, rtol=0, atol=0, equal_nan=True)
    finally:
        extension._C.use_instruction_set(best)


@every_case
def test_no_grad_gives_the_same_output(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    with torch.no_grad():
        silent = run(op, case, inputs, backend)
    assert torch.equal(silent, results(op, case, inputs, backend)["y"])


@one_case
def test_empty_batch(op, case, backend, device):
    inputs = tuple(t[:0] for t in case.inputs(device, torch.float32))
    actual, eager = results(op, case, inputs, backend), results(op, case, inputs, "eager")
    assert {k: t.shape for k, t in actual.items()} == {k: t.shape for k, t in eager.items()}


@every_case
def test_strided_inputs_give_the_same_bits(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    strided = tuple(t.repeat_interleave(2, dim=-1)[..., ::2] for t in inputs)
    assert not strided[0].is_contiguous()
    contiguous = results(op, case, inputs, backend)
    for name, value in results(op, case, strided, backend).items():
        assert torch.equal(value, contiguous[name]), name


@small_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_inf_come_out_where_eager_has_them(op, case, backend, device, dtype, bad):
    clean = case.inputs(device, dtype)
    for position in range(len(clean)):
        inputs = tuple(t.clone() for t in clean)
        inputs[position].view(-1)[-1] = bad
        actual, eager = results(op, case, inputs, backend), results(op, case, inputs, "eager")
        torch.testing.assert_close(actual["y"], eager["y"], rtol=0.1, atol=0.1, equal_nan=True)
        for name in actual:  # inf - inf in a gradient depends on the order of its terms
            assert torch.equal(actual[name].isfinite(), eager[name].isfinite()), (position, name)


@pytest.mark.parametrize(
    ("op", "case", "backend", "device"), [*grid(slice(1, None)), *grid(large=True)]
)
def test_bits_do_not_depend_on_batch_or_threads(op, case, backend, device, two_threads):
    inputs = case.inputs(device, torch.float32)
    y = run(op, case, inputs, backend)
    together = results(op, case, inputs, backend, d_y=y)
    torch.set_num_threads(1)
    for name, value in results(op, case, inputs, backend, d_y=y).items():
        assert torch.equal(value, together[name]), name
    for sample in range(inputs[0].shape[0]):
        one = slice(sample, sample + 1)
        alone = results(op, case, tuple(t[one] for t in inputs), backend, d_y=y[one])
        for name, value in alone.items():
            assert torch.equal(value, together[name][one]), (name, sample)


@one_case
def test_registration(op, case, backend, device):
    """Schema, fake kernel and aliasing rules agree with the compiled kernels, backward included."""
    if backend != "native":
        pytest.skip("only native ops are registered with PyTorch")
    with Recorder() as recorder:
        results(op, case, case.inputs(device, torch.float32), backend)
    assert {func._opname for func, _ in recorder.calls} == set(op.schemas)
    for func, args in recorder.calls:
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(func, plain)


@pytest.mark.parametrize(("op", "case", "backend", "device"), grid(slice(0, 7)))
def test_gradients_against_finite_differences(op, case, backend, device):
    inputs = case.inputs(device, torch.float64)
    if inputs[0].numel() > 8000 or op.refusal(inputs[0], backend):
        pytest.skip("too large, or no float64")
    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    torch.autograd.gradcheck(lambda *t: run(op, case, t, backend), leaves, fast_mode=True)


@one_case
def test_a_second_derivative_is_refused_not_wrong(op, case, backend, device):
    leaves = tuple(t.clone().requires_grad_() for t in case.inputs(device, torch.float32))
    d_x = torch.autograd.grad(
        run(op, case, leaves, backend).square().sum(), leaves[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x[0].sum().backward()


@one_case
def test_compiles_whole_with_gradients(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    options = case.options(device)

    def whole(*tensors):
        return op.public(*tensors, **options, backend=backend) * 2

    leaves = [t.clone().requires_grad_() for t in inputs]
    y = torch.compile(whole, fullgraph=True, backend="aot_eager")(*leaves)
    grads = torch.autograd.grad(y.sum(), leaves)
    plain = results(op, case, inputs, backend, d_y=torch.full_like(y, 2))
    torch.testing.assert_close(y, plain["y"] * 2)
    for i, grad in enumerate(grads):
        torch.testing.assert_close(grad, plain[f"d_{i}"])


@one_case
def test_another_length_does_not_recompile(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    options = case.options(device)
    counter = CompileCounter()
    compiled = torch.compile(
        lambda *t: op.public(*t, **options), fullgraph=True, dynamic=True, backend=counter
    )
    for length in (5, 9, 16):
        compiled(inputs[0][:, :length].clone(), *inputs[1:])
    assert counter.frame_count == 1


def test_inductor_runs_the_op():
    x, shift, scale = torch.randn(2, 9, 24), torch.randn(2, 24), torch.randn(2, 24)
    compiled = torch.compile(lambda *t: ops.adaln_norm(*t) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x, shift, scale), ops.adaln_norm(x, shift, scale) + 1)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(0, 40),
    st.integers(1, 140),
    st.sampled_from(DTYPES),
    st.sampled_from([1e-6, 1e-5, 1e-2]),
)
def test_adaln_norm_at_any_size(B, L, D, dtype, eps):
    x, table = torch.randn(B, L, D), torch.randn(B, 6 * D)
    shift, scale = table.to(dtype).chunk(6, dim=-1)[2:4]
    y = ops.adaln_norm(x.to(dtype), shift, scale, eps=eps)
    eager = ops.adaln_norm(x.to(dtype), shift, scale, eps=eps, backend="eager")
    tolerance = 64 * torch.finfo(dtype).eps if dtype.itemsize > 2 else torch.finfo(dtype).eps
    torch.testing.assert_close(y, eager, rtol=tolerance, atol=tolerance * 8)


def test_standardize_inverts_itself():
    x, mean, std = torch.randn(2, 9, 20), torch.randn(20), torch.rand(20) + 0.5
    y = ops.clip_normalize(x, mode="standardize", mean=mean, std=std)
    back = ops.clip_normalize(y, mode="standardize", mean=mean, std=std, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_pooling_averages_squares_of_the_grid():
    x = torch.arange(1.0, 17.0).view(1, 16, 1).expand(1, 16, 3)
    y = ops.clip_normalize(x, mode="standardize", mean=torch.zeros(3), std=torch.ones(3), pool=2)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([3.5, 5.5, 11.5, 13.5]))


def test_zero_vector_stays_zero_in_l2():
    x = torch.zeros(1, 2, 5, requires_grad=True)
    y = ops.clip_normalize(x, mode="l2", eps=0.5)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 8)}, ShapeError, r"x must be \[B, L, D\], got \[2, 8\]"),
        ({"shift": torch.zeros(2, 7)}, ShapeError, r"shift must be \[2, 8\], got \[2, 7\]"),
        ({"scale": torch.zeros(1, 8)}, ShapeError, r"scale must be \[2, 8\], got \[1, 8\]"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"scale": torch.zeros(2, 8).double()}, TypeError, "scale must be torch.float32"),
        ({"shift": torch.zeros(2, 8, device="meta")}, TypeError, "on meta"),
        ({"backend": "cuda"}, BackendUnavailable, "'cuda' is not one of"),
    ],
)
def test_adaln_norm_says_what_is_wrong(change, error, words):
    call = {"x": torch.zeros(2, 5, 8), "shift": torch.zeros(2, 8), "scale": torch.zeros(2, 8)}
    with pytest.raises(error, match=words):
        ops.adaln_norm(**call | change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mode": "l3"}, ValueError, "mode must be one of l2, layer, standardize, got 'l3'"),
        ({"mode": "standardize"}, ValueError, "mean must be a tensor"),
        ({"mean": torch.zeros(8)}, ValueError, "mean must be None in l2"),
        ({"inverse": True}, ValueError, "inverse must go with mode 'standardize'"),
        ({"pool": 0}, ValueError, "pool must be at least 1"),
        ({"pool": 2}, ShapeError, "got N = 5"),
    ],
)
def test_clip_normalize_says_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        ops.clip_normalize(torch.zeros(2, 5, 8), **change)
