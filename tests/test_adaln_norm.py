"""What adaln_norm says of bad input, beside the tests of every op in test_ops.py."""

import pytest
import torch

from clipflow import ops
from clipflow.errors import BackendUnavailable, ShapeError


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
