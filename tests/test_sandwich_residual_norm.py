"""What sandwich_residual_norm means and says of bad input, beside the tests in test_ops.py."""

import pytest
import torch

from clipflow import ops
from clipflow.errors import BackendUnavailable, ShapeError


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 8)}, ShapeError, r"x must be \[B, L, D\] or"),
        ({"y": torch.zeros(2, 4, 8)}, ShapeError, r"y must be \[2, 5, 8\], got \[2, 4, 8\]"),
        ({"gate": torch.zeros(2, 7)}, ShapeError, r"gate must be \[2, 8\], got \[2, 7\]"),
        ({"scale": torch.zeros(2, 5, 8)}, ShapeError, r"scale must be \[2, 8\], got \[2, 5, 8\]"),
        ({"weight": torch.zeros(2, 8)}, ShapeError, r"weight must be \[8\], got \[2, 8\]"),
        ({"next_weight": torch.zeros(9)}, ShapeError, r"next_weight must be \[8\], got \[9\]"),
        ({"gate": torch.zeros(2, 8).half()}, TypeError, "gate must be torch.float32"),
        ({"weight": torch.zeros(8, device="meta")}, TypeError, "on meta"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"backend": "cuda"}, BackendUnavailable, "'cuda' is not one of"),
    ],
)
def test_sandwich_residual_norm_says_what_is_wrong(change, error, words):
    call = {"x": torch.zeros(2, 5, 8), "y": torch.zeros(2, 5, 8)}
    call |= {name: torch.zeros(2, 8) for name in ("gate", "scale")}
    with pytest.raises(error, match=words):
        ops.sandwich_residual_norm(**call | change)


def test_a_gate_of_zeros_leaves_the_stream_alone():
    x, y = torch.randn(2, 2, 9, 40)
    zeros, scale = torch.zeros(2, 40), torch.randn(2, 40)
    h, normed = ops.sandwich_residual_norm(x, y, zeros, scale)
    assert torch.equal(h, x)
    torch.testing.assert_close(normed, ops.adaln_norm(x, None, scale, norm="rms", eps=1e-5))


def test_gates_of_every_size():
    """The kernel has a tanh of its own."""
    gate = torch.cat([torch.linspace(-12, 12, 4001), 10 ** torch.linspace(-30, 30, 99)])
    gate = torch.cat([gate, torch.tensor([0.625, -0.625, float("inf"), -float("inf")])])[None]
    ones = torch.ones(1, 1, gate.shape[1])
    h, _ = ops.sandwich_residual_norm(0 * ones, ones, gate, 0 * ones[0], eps=0.0)
    exact = gate.double().tanh()
    error = (h[0].double() - exact).abs() / exact.abs().clamp_min(1e-30)
    assert error.max() < 3 * torch.finfo(torch.float32).eps
