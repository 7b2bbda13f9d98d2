"""Meaning and errors of flow_interpolate, beside the tests of every op in test_ops.py."""

import pytest
import torch

from clipflow import ops
from clipflow.errors import BackendUnavailable, ShapeError
from clipflow.ops.flow_interpolate import OP
from clipflow.registry import TRITON_INTERPRETED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_at_data_and_noise(dtype):
    data, noise = torch.randn(2, 3, 5, 7).to(dtype).unbind(0)
    noisy, target = ops.flow_interpolate(data, noise, torch.tensor([0.0, 1.0, 0.5]))
    assert torch.equal(noisy[0], data[0])
    assert torch.equal(noisy[1], noise[1])
    assert torch.equal(target, (noise.float() - data.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_batches_have_the_bits_of_eager(dtype):
    """Outputs beyond the caches are written past them."""
    if TRITON_INTERPRETED:
        pytest.skip("minutes in Triton's interpreter")
    data, noise = torch.randn(2, 3, 2_500_003, dtype=torch.float32).to(dtype).unbind(0)
    sigmas = torch.tensor([0.1, 0.7, 1.0])
    found = ops.flow_interpolate(data, noise, sigmas)
    wanted = ops.flow_interpolate(data, noise, sigmas, backend="eager")
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_float64_data_take_levels_of_either_dtype():
    data, noise = torch.randn(2, 3, 5, dtype=torch.float64).unbind(0)
    sigmas = torch.rand(3)
    found = ops.flow_interpolate(data, noise, sigmas)
    torch.testing.assert_close(found, ops.flow_interpolate(data, noise, sigmas.double()))
    torch.testing.assert_close(found, ops.flow_interpolate(data, noise, sigmas, backend="eager"))


def test_gradients_come_from_eager():
    data, noise = torch.randn(2, 3, 5).unbind(0)
    data = data.clone().requires_grad_()
    noisy, target = ops.flow_interpolate(data, noise, torch.tensor([0.25] * 3))
    (noisy + target).sum().backward()
    torch.testing.assert_close(data.grad, torch.full_like(data, -0.25))
    if OP.refusal(data, "native") is None:
        with pytest.raises(BackendUnavailable, match="has no gradient"):
            ops.flow_interpolate(data, noise, torch.rand(3), backend="native")


DATA = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"data": DATA.int()}, TypeError, "data must be float32, bfloat16"),
        ({"data": DATA[0, 0]}, ShapeError, r"data must be \[B, ...\], got \[\]"),
        ({"noise": DATA[:1]}, ShapeError, r"noise must be \[2, 3\], got \[1, 3\]"),
        ({"noise": DATA.half()}, TypeError, "noise must be torch.float32"),
        ({"noise": DATA.to("meta")}, TypeError, "noise must be torch.float32 on cpu"),
        ({"sigmas": torch.zeros(3)}, ShapeError, r"sigmas must be \[2\], got \[3\]"),
        ({"sigmas": torch.zeros(2).half()}, TypeError, "sigmas must be float32 on cpu"),
        ({"sigmas": torch.zeros(2).double()}, TypeError, "sigmas must be float32 on cpu"),
        ({"sigmas": torch.zeros(2, device="meta")}, TypeError, "sigmas must be float32 on cpu"),
    ],
)
def test_flow_interpolate_says_what_is_wrong(change, error, words):
    call = {"data": DATA, "noise": DATA, "sigmas": torch.zeros(2)} | change
    with pytest.raises(error, match=words):
        ops.flow_interpolate(**call)
