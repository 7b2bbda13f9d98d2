"""Every op with a keyword `out`: the same bits, in the tensors given, and nothing allocated."""

import pytest
import torch
from op_calls import outs_like, run, run_into, takes_out, tensors_of
from test_ops import parametrize

from clipflow import extension, ops
from clipflow.errors import ShapeError
from clipflow.registry import TRITON_INTERPRETED

CPU = torch.device("cpu")
OPS = [op for op in ops.all_ops() if takes_out(op)]
DTYPES = [torch.float32, torch.bfloat16]
CASES = slice(0, 2) if TRITON_INTERPRETED else slice(None)  # the others take it minutes
not_interpreted = pytest.mark.skipif(TRITON_INTERPRETED, reason="no matter of the kernel")
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def same(actual, wanted):
    return all(
        torch.equal(a.view(torch.uint8), w.view(torch.uint8))
        for a, w in zip(tensors_of(actual), tensors_of(wanted), strict=True)
    )


def second_case(op, dtype=torch.float32):
    """(case, inputs, what comes out of it, tensors for that) on the CPU."""
    case = op.cases[1]
    inputs = case.inputs(CPU, dtype)
    with torch.no_grad():
        plain = run(op, case, inputs, "auto")
    return case, inputs, plain, outs_like(plain)


@parametrize(CASES, only=takes_out)
@pytest.mark.parametrize("dtype", DTYPES[: 1 if TRITON_INTERPRETED else 2], ids=str)
@torch.no_grad()
def test_the_bits_of_a_call_without_out_in_the_tensors_given(op, case, backend, device, dtype):
    inputs = case.inputs(device, dtype)
    for name in (backend, "eager"):
        plain = run(op, case, inputs, name)
        out = outs_like(plain)
        returned = run_into(op, case, inputs, name, out)
        assert type(returned) is type(out)
        given = {id(t) for t in tensors_of(out)}
        assert all(id(t) in given for t in tensors_of(returned))
        assert same(returned, plain), name


@parametrize(CASES, only=lambda op: op.in_place)
@torch.no_grad()
def test_results_may_take_the_place_of_inputs(op, case, backend, device):
    inputs = case.inputs(device, torch.float32)
    for name in (backend, "eager"):
        plain = run(op, case, inputs, name)
        copies = tuple(t.clone() for t in inputs)
        out = tuple(
            copies[i] if i in op.in_place and i < len(inputs) else fresh
            for i, fresh in enumerate(outs_like(plain))
        )
        returned = run_into(op, case, copies, name, out)
        assert returned[0] is copies[0]
        assert same(returned, plain), name


@parametrize(slice(1, 2), only=takes_out)
@torch.no_grad()
def test_outs_may_begin_anywhere_in_memory(op, case, backend, device):
    """Not at the boundaries that wide stores need."""
    inputs = case.inputs(device, torch.float32)
    plain = run(op, case, inputs, backend)
    shifted = tuple(t.new_empty(t.numel() + 1)[1:].view(t.shape) for t in tensors_of(plain))
    out = shifted[0] if isinstance(plain, torch.Tensor) else shifted
    torch.testing.assert_close(run_into(op, case, inputs, backend, out), plain)


@not_interpreted
@every_op
@torch.no_grad()
def test_wrong_outs_are_named(op):
    case, inputs, _, out = second_case(op)
    whole = tensors_of(out)

    def with_first(first):
        return first if isinstance(out, torch.Tensor) else (first, *whole[1:])

    first = whole[0]
    other = torch.float64 if first.dtype == torch.float32 else torch.float32
    wrong = {
        ShapeError: first.new_empty(3, *first.shape),
        TypeError: first.to(other),
        ValueError: first.new_empty(*first.shape[:-1], 2 * first.shape[-1])[..., ::2],
    }
    for error, tensor in wrong.items():
        with pytest.raises(error, match=rf"^{op.name}: out(\[0\])? must .*got"):
            run_into(op, case, inputs, "auto", with_first(tensor))
    with pytest.raises(TypeError, match=rf"^{op.name}: out.* must be .* on cpu, got .* on meta"):
        run_into(op, case, inputs, "auto", with_first(first.to("meta")))
    count = (first, first, first, first) if isinstance(out, torch.Tensor) else whole[:1]
    with pytest.raises((TypeError, ValueError), match=rf"^{op.name}: out must be .*, got"):
        run_into(op, case, inputs, "auto", count)


@not_interpreted
@every_op
def test_gradients_are_refused(op):
    case, inputs, _, out = second_case(op)
    leaves = (inputs[0].clone().requires_grad_(), *inputs[1:])
    with pytest.raises(RuntimeError, match=rf"^{op.name}: .*torch\.no_grad\(\)"):
        run_into(op, case, leaves, "auto", out)
    with torch.no_grad():
        run_into(op, case, leaves, "auto", out)


@not_interpreted
@every_op
@torch.no_grad()
def test_nothing_is_allocated(op):
    if op.refusal(torch.empty(1), "native"):
        pytest.skip("no compiled kernel for the CPU")
    for case in op.cases:
        inputs, options = case.inputs(CPU, torch.float32), case.options(CPU)
        call = case.of(op.public)
        out = outs_like(run(op, case, inputs, "native"))
        with torch.profiler.profile(profile_memory=True) as profile:
            call(*inputs, **options, out=out, backend="native")
        assert bytes_allocated(profile) == 0, case.name
    with torch.profiler.profile(profile_memory=True) as profile:
        call(*inputs, **options, backend="native")
    assert bytes_allocated(profile) > 0


@not_interpreted
@torch.no_grad()
def test_a_quantized_layer_allocates_nothing():
    """What the norm has quantized goes on to the product, in tensors made once."""
    if not extension.LOADED:
        pytest.skip("there is no compiled extension")
    x, shift, scale = torch.randn(2, 9, 40), torch.randn(2, 40), torch.randn(2, 40)
    weight, bias = ops.quantize_weight(torch.randn(24, 40)), torch.randn(24)
    kept = (torch.empty(x.shape, dtype=torch.int8), torch.empty(2, 9))
    out = torch.empty(2, 9, 24)

    def layer(kept=None, out=None):
        values, scales = ops.adaln_norm_quant(x, shift, scale, out=kept)
        return ops.quantized_linear(values, weight, bias, x_scales=scales, out=out)

    plain = layer()
    with torch.profiler.profile(profile_memory=True) as profile:
        assert layer(kept, out) is out
    assert bytes_allocated(profile) == 0
    assert torch.equal(out, plain)


def bytes_allocated(profile) -> int:
    return sum(
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    )


@not_interpreted
@every_op
@torch.no_grad()
def test_compiles_whole(op):
    case, inputs, plain, out = second_case(op)
    options = case.options(CPU)
    torch._dynamo.reset()

    def whole(*tensors):
        results = case.of(op.public)(*tensors, **options, out=out)
        return [t.float() + 1 for t in tensors_of(results)]

    found = torch.compile(whole, fullgraph=True, backend="aot_eager")(*inputs)
    assert same(out, plain) or op.name == "flow_step"  # whose last result may be another's
    for actual, wanted in zip(found, tensors_of(plain), strict=True):
        assert torch.equal(actual, wanted.float() + 1)
