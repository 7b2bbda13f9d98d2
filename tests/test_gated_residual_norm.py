"""What gated_residual_norm means and says of bad input, beside the tests in test_ops.py."""

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
        ({"gate": torch.zeros(2, 5, 8)}, ShapeError, r"gate must be \[2, 8\], got \[2, 5, 8\]"),
        ({"shift": torch.zeros(1, 8)}, ShapeError, r"shift must be \[2, 8\], got \[1, 8\]"),
        ({"scale": torch.zeros(1, 8)}, ShapeError, r"scale must be \[2, 8\] or \[2, 5, 8\], got"),
        ({"gate_table": torch.zeros(2, 8)}, ShapeError, r"gate_table must be \[8\], got \[2, 8\]"),
        ({"table": torch.zeros(3, 8)}, ShapeError, r"table must be \[2, 8\], got \[3, 8\]"),
        ({"y": torch.zeros(2, 5, 8).half()}, TypeError, "y must be torch.float32"),
        ({"gate": torch.zeros(2, 8, device="meta")}, TypeError, "on meta"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.int32)}, TypeError, "got torch.int32"),
        (
            {"gate": None, "gate_table": torch.zeros(8)},
            ValueError,
            "gate_table must be None without a gate",
        ),
        ({"norm": "group"}, ValueError, "norm must be one of layer, rms, got 'group'"),
        ({"backend": "cuda"}, BackendUnavailable, "'cuda' is not one of"),
    ],
)
def test_gated_residual_norm_says_what_is_wrong(change, error, words):
    call = {"x": torch.zeros(2, 5, 8), "y": torch.zeros(2, 5, 8)}
    call |= {name: torch.zeros(2, 8) for name in ("gate", "shift", "scale")}
    with pytest.raises(error, match=words):
        ops.gated_residual_norm(**call | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_the_stream_as_stored(dtype):
    x, y = torch.randn(2, 2, 9, 40, dtype=dtype)
    gate, shift, scale = torch.randn(2, 120, dtype=dtype).chunk(3, dim=-1)
    h, normed = ops.gated_residual_norm(x, y, gate, shift, scale)
    wide = x.double() + gate[:, None].double() * y.double()
    torch.testing.assert_close(h, wide.to(dtype))
    torch.testing.assert_close(normed, ops.adaln_norm(h, shift, scale))


def test_without_a_gate_both_branches_have_the_same_gradient():
    x, y = (torch.randn(2, 9, 40, requires_grad=True) for _ in range(2))
    _, normed = ops.gated_residual_norm(x, y, None, None, torch.zeros(2, 40))
    d_x, d_y = torch.autograd.grad(normed.square().sum() + normed[0, 0, 0], (x, y))
    assert torch.equal(d_x, d_y)
