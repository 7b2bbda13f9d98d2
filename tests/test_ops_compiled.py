"""Every registered op under torch.compile, and as PyTorch knows it: schema and fake kernel."""

import pytest
import torch
from op_calls import Recorder, outputs, outs_like, results, run, run_into, takes_out
from test_ops import one_case, parametrize
from torch._dynamo.testing import CompileCounter

LENGTHS = (5, 9, 16, 17, 25, 30, 33, 36, 49, 64)


@one_case
def test_registration(op, case, backend, device):
    """Schema, fake kernel and aliasing rules agree with the compiled kernels, backward included."""
    if backend != "native" or not op.schemas:
        pytest.skip("only compiled kernels are registered with PyTorch")
    with Recorder() as recorder:
        for each in op.cases:
            inputs = each.inputs(device, torch.float32)
            results(op, each, inputs, backend)
            if takes_out(op):
                with torch.no_grad():
                    run_into(op, each, inputs, backend, outs_like(run(op, each, inputs, backend)))
    assert {func._opname for func, _ in recorder.calls} == set(op.schemas)
    for func, args in {func: (func, args) for func, args in recorder.calls}.values():
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(func, plain)


@one_case
def test_compiles_whole_with_gradients(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    options = case.options(device)

    def whole(*tensors):
        ys = outputs(op, case.of(op.public)(*tensors, **options, backend=backend))
        return {name: y * 2 for name, y in ys.items()}

    leaves = [t.clone().requires_grad_(op.differentiable) for t in inputs]
    torch._dynamo.reset()
    ys = torch.compile(whole, fullgraph=True, backend="aot_eager")(*leaves)
    d_y = {name: torch.full_like(y, 2) for name, y in ys.items()}
    plain = results(op, case, inputs, backend, d_y=d_y)
    for name, y in ys.items():
        torch.testing.assert_close(y, plain[name] * 2)
    if op.differentiable:
        grads = torch.autograd.grad(sum(y.sum() for y in ys.values()), leaves)
        for i, grad in enumerate(grads):
            torch.testing.assert_close(grad, plain[f"d_{i}"])


@parametrize(slice(0, 1))
def test_another_length_does_not_recompile(op, case, backend, device):
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(op.public, fullgraph=True, dynamic=True, backend=counter)
    for length in LENGTHS:
        case = op.of_length(length)
        compiled(*case.inputs(device, torch.float32), backend=backend, **case.options(device))
    assert counter.frame_count == 1


@parametrize(slice(1, 2))
def test_inductor_runs_the_op(op, case, backend, device):
    inputs, options = case.inputs(device, torch.float32), case.options(device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: outputs(op, case.of(op.public)(*t, **options, backend=backend)),
        fullgraph=True,
    )
    plain = outputs(op, case.of(op.public)(*inputs, **options, backend=backend))
    for name, y in compiled(*inputs).items():
        torch.testing.assert_close(y, plain[name])
