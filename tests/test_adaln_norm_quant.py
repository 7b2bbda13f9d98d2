"""What adaln_norm_quant means and says of bad input, beside the tests in test_ops.py."""

import pytest
import torch
from op_calls import DEVICES

from clipflow import ops
from clipflow.errors import BackendUnavailable, ShapeError

OP = next(op for op in ops.all_ops() if op.name == "adaln_norm_quant")
DTYPES = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 8)}, ShapeError, r"x must be \[B, L, D\] or"),
        ({"shift": torch.zeros(2, 7)}, ShapeError, r"shift must be \[2, 8\], got \[2, 7\]"),
        ({"scale": torch.zeros(1, 8)}, ShapeError, r"scale must be \[2, 8\] or \[2, 5, 8\], got"),
        ({"weight": torch.zeros(7)}, ShapeError, r"weight must be \[8\], got \[7\]"),
        ({"table": torch.zeros(8)}, ShapeError, r"table must be \[2, 8\], got \[8\]"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.int8)}, TypeError, "got torch.int8"),
        ({"shift": torch.zeros(2, 8, device="meta")}, TypeError, "on meta"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be torch.int8 or torch.float8_e4m3fn, got"),
        ({"norm": "l2"}, ValueError, "norm must be one of layer, rms, got 'l2'"),
        ({"backend": "cuda"}, BackendUnavailable, "'cuda' is not one of"),
    ],
)
def test_adaln_norm_quant_says_what_is_wrong(change, error, words):
    call = {"x": torch.zeros(2, 5, 8), "shift": torch.zeros(2, 8), "scale": torch.zeros(2, 8)}
    with pytest.raises(error, match=words):
        ops.adaln_norm_quant(**call | change)


def backends(device, dtype):
    """Those that run, eager last."""
    return [
        name for name in OP.order if OP.refusal(torch.empty(1, device=device), name, dtype) is None
    ]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_token_fills_the_range(device, dtype):
    x, shift, scale = torch.randn(2, 9, 40, device=device), *torch.randn(2, 2, 40, device=device)
    y = ops.adaln_norm(x, shift, scale, backend="eager")
    most, step = (127, 0.5) if dtype == torch.int8 else (448, 16)  # half the distance at the top
    for backend in backends(device, dtype):
        values, scales = ops.adaln_norm_quant(x, shift, scale, dtype=dtype, backend=backend)
        assert values.dtype == dtype and scales.dtype == torch.float32
        assert torch.equal(values.float().abs().amax(-1), torch.full((2, 9), most, device=device))
        torch.testing.assert_close(scales, y.abs().amax(-1) / most)
        error = (values.float() * scales[..., None] - y).abs() / scales[..., None]
        assert error.max() <= step * 1.001, backend


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_zeros_are_zeros_and_bad_ones_have_no_scale(device, dtype):
    x = torch.zeros(1, 4, 40, device=device)
    x[0, 1, 3], x[0, 2, 3], x[0, 3] = float("nan"), float("inf"), 1e30
    zeros = torch.zeros(1, 40, device=device)
    for backend in backends(device, dtype):
        values, scales = ops.adaln_norm_quant(
            x, None, zeros, norm="rms", dtype=dtype, backend=backend
        )
        assert not values[0, 0].float().any() and scales[0, 0] > 0, backend
        assert scales[0, 1:3].isnan().all(), backend


def test_the_cpu_has_no_compiled_kernel_for_fp8():
    x, scale = torch.randn(2, 9, 40), torch.zeros(2, 40)
    with pytest.raises(BackendUnavailable, match="'native' emits int8 alone on the CPU"):
        ops.adaln_norm_quant(x, None, scale, dtype=torch.float8_e4m3fn, backend="native")
    values, _ = ops.adaln_norm_quant(x, None, scale, dtype=torch.float8_e4m3fn)
    assert values.dtype == torch.float8_e4m3fn
