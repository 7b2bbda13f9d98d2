"""Meaning, buffers and errors of flow_step, beside the tests of every op in test_ops.py."""

import pytest
import torch
from op_calls import DEVICES, Recorder, backends_under_test

from clipflow import ops
from clipflow.errors import BackendUnavailable, ShapeError
from clipflow.ops.flow_step import FORMS, OP
from clipflow.registry import TRITON_INTERPRETED

NUMBERS = (-0.7, 0.35, 0.8, 0.2)
HALF = [torch.bfloat16, torch.float16]
WILLING = [
    pytest.param(device, backend, id=f"{backend}-{device}")
    for device in DEVICES
    for backend in ["eager", *backends_under_test(OP)]
    if OP.refusal(torch.empty(1, device=device), backend) is None
]
every_backend = pytest.mark.parametrize(("device", "backend"), WILLING)
every_form = pytest.mark.parametrize(("solver", "second"), FORMS)


def tensors(device, second, rows=2, velocity=torch.bfloat16):
    latents, previous = torch.randn(2, 3, 5, 11, device=device).unbind(0)
    v = torch.randn(3 * rows, 5, 11, device=device, dtype=velocity)
    return (latents, v, previous.clone()) if second else (latents, v)


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        if TRITON_INTERPRETED and one.dtype == torch.bfloat16:  # it cuts off, the GPU rounds
            torch.testing.assert_close(one, other, rtol=2**-7, atol=0)
        else:
            assert torch.equal(one, other)


@every_backend
@every_form
@pytest.mark.parametrize("model_dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("velocity", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_has_the_bits_of_eager_in_every_form_and_dtype(
    device, backend, solver, second, rows, velocity, model_dtype
):
    call = tensors(device, second, rows, velocity)
    options = {"coefficients": NUMBERS, "solver": solver, "model_dtype": model_dtype}
    options["guidance"] = 4.5 if rows == 2 else 1.0
    found = ops.flow_step(*call, **options, backend=backend)
    wanted = ops.flow_step(*call, **options, backend="eager")
    assert_same(found, wanted)
    assert found[1].shape == call[1].shape


@every_backend
@every_form
def test_out_may_be_the_inputs(device, backend, solver, second):
    call = tensors(device, second)
    options = {"coefficients": NUMBERS, "solver": solver, "guidance": 3.0}
    wanted = ops.flow_step(*call, **options, backend="eager")
    out = (call[0], torch.empty_like(call[1]), call[2] if second else torch.empty_like(call[0]))
    found = ops.flow_step(*call, **options, out=out, backend=backend)
    assert_same(found, wanted)
    assert found[0] is out[0] and found[1] is out[1]
    assert found[2] is (
        out[2] if solver == "dpmpp_2m" or (not second and solver == "heun") else out[0]
    )


@every_backend
def test_out_of_float64_latents(device, backend):
    if backend == "triton":
        pytest.skip("has no float64 kernel")
    latents, velocity = torch.randn(2, 3, 4, device=device, dtype=torch.float64).unbind(0)
    options = {"coefficients": NUMBERS, "solver": "heun", "model_dtype": torch.bfloat16}
    wanted = ops.flow_step(latents, velocity.float(), **options, backend="eager")
    out = tuple(torch.empty_like(tensor) for tensor in wanted)
    assert_same(ops.flow_step(latents, velocity.float(), **options, backend=backend), wanted)
    assert_same(ops.flow_step(latents, velocity.float(), **options, out=out, backend=backend), out)
    torch.testing.assert_close(out, wanted)


@every_backend
@every_form
def test_coefficients_and_guidance_on_the_device_are_the_same_numbers(
    device, backend, solver, second
):
    call = tensors(device, second)
    table = torch.tensor(NUMBERS, dtype=torch.float64, device=device)
    scale = torch.full((3,), 4.3, device=device)
    found = ops.flow_step(*call, coefficients=table, solver=solver, guidance=scale, backend=backend)
    number = scale[0].item()
    assert_same(
        found,
        ops.flow_step(*call, coefficients=NUMBERS, solver=solver, guidance=number, backend=backend),
    )


@every_backend
def test_guidance_belongs_to_its_sample(device, backend):
    latents, velocity = tensors(device, second=False)
    scale = torch.tensor([1.5, 0.0, 7.0], device=device)
    together = ops.flow_step(
        latents, velocity, coefficients=NUMBERS, guidance=scale, backend=backend
    )
    for sample, guidance in enumerate(scale.tolist()):
        alone = ops.flow_step(
            latents[sample : sample + 1],
            velocity[sample::3],
            coefficients=NUMBERS,
            guidance=guidance,
            backend=backend,
        )
        assert torch.equal(alone[0][0], together[0][sample])
        assert torch.equal(alone[1][1], together[1][3 + sample])


@pytest.mark.parametrize("values", [40_000, 2_500_000], ids=["kept in cache", "streamed"])
@every_form
def test_large_latents_have_the_bits_of_eager(solver, second, values):
    if TRITON_INTERPRETED:
        pytest.skip("minutes in Triton's interpreter")
    latents, previous = torch.randn(2, 3, values + 3).unbind(0)
    call = (latents, torch.randn(6, values + 3).to(torch.float16), previous)
    options = {"coefficients": NUMBERS, "solver": solver, "guidance": torch.tensor([1.0, 2.5, 9])}
    found, wanted = (
        ops.flow_step(*call[: 3 if second else 2], **options, backend=backend)
        for backend in ("auto", "eager")
    )
    assert_same(found, wanted)


def test_out_is_registered_as_it_behaves():
    if OP.refusal(torch.empty(1), "native"):
        pytest.skip("there is no compiled kernel")
    call = tensors("cpu", second=True)
    wanted = ops.flow_step(*call, coefficients=NUMBERS, solver="dpmpp_2m", guidance=2.0)
    out = tuple(torch.empty_like(tensor) for tensor in wanted)
    with Recorder() as recorder:
        ops.flow_step(*call, coefficients=NUMBERS, solver="dpmpp_2m", guidance=2.0, out=out,
                      backend="native")  # fmt: skip
    ((func, args),) = recorder.calls
    torch.library.opcheck(func, args)


def test_gradients_come_from_eager():
    latents, velocity = tensors("cpu", second=False)
    velocity.requires_grad_()
    options = {"coefficients": NUMBERS, "guidance": 2.0}
    assert ops.flow_step(latents, velocity, **options)[0].requires_grad
    if OP.refusal(latents, "native") is None:
        with pytest.raises(BackendUnavailable, match="has no gradient"):
            ops.flow_step(latents, velocity, **options, backend="native")
    with torch.no_grad():
        assert not ops.flow_step(latents, velocity, **options)[0].requires_grad


LATENTS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"solver": "ddim"}, ValueError, "solver must be one of euler, heun, dpmpp_2m, got 'ddim'"),
        ({"latents": LATENTS.bfloat16()}, TypeError, "latents must be float32 or float64"),
        ({"velocity": LATENTS.int()}, TypeError, "velocity must be float32, bfloat16"),
        ({"velocity": LATENTS.double()}, TypeError, "velocity must be narrower than float64"),
        ({"velocity": LATENTS.to("meta")}, TypeError, "velocity must be on cpu as latents is"),
        ({"velocity": LATENTS[:1]}, ShapeError, r"velocity must be \[2, 3, 4\], or twice"),
        ({"velocity": LATENTS[..., :1]}, ShapeError, r"got \[2, 3, 1\]"),
        ({"previous": LATENTS}, ValueError, "previous must be None with 'euler'"),
        ({"previous": LATENTS[0], "solver": "heun"}, ShapeError, "previous must be"),
        ({"previous": LATENTS.half(), "solver": "heun"}, TypeError, "previous must be"),
        ({"coefficients": (1.0,)}, ValueError, "coefficients must be 4 numbers, got 1"),
        ({"coefficients": torch.zeros(3)}, ShapeError, r"coefficients must be \[4\]"),
        ({"coefficients": torch.zeros(4)}, TypeError, "coefficients must be torch.float64 on cpu"),
        ({"guidance": 2.0}, ValueError, "guidance must be 1 without null rows"),
        ({"guidance": torch.ones(2)}, ValueError, "guidance must be 1 without null rows"),
        ({"guidance": torch.ones(3)}, ShapeError, r"guidance must be \[2\]"),
        ({"guidance": torch.ones(2).half()}, TypeError, "guidance must be torch.float32 on cpu"),
        ({"out": (LATENTS[0],) * 3}, ShapeError, r"out\[0\] must be \[2, 3, 4\]"),
        ({"out": (LATENTS, LATENTS.half(), LATENTS)}, TypeError, r"out\[1\] must be torch.float32"),
        (
            {"out": (torch.zeros(2, 4, 3).mT, LATENTS, LATENTS)},
            ValueError,
            r"out\[0\] must be contiguous",
        ),
    ],
)
def test_flow_step_says_what_is_wrong(change, error, words):
    call = {"latents": LATENTS, "velocity": LATENTS, "coefficients": NUMBERS} | change
    with pytest.raises(error, match=words):
        ops.flow_step(**call)
