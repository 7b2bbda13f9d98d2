"""Meaning and errors of clip_normalize, beside the tests of every op in test_ops.py."""

import pytest
import torch

from clipflow import extension, ops
from clipflow.errors import ShapeError


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
