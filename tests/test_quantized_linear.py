"""Meaning and errors of quantized_linear, beside the tests of every op in test_ops.py."""

import sys

import pytest
import torch
import torch.nn.functional as F

from clipflow import extension, ops
from clipflow.errors import BackendUnavailable, ShapeError

FP8 = torch.float8_e4m3fn
SIZES = [(1, 1, 3), (7, 16, 16), (70, 100, 40), (130, 700, 33)]


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape) * 2.0 - 1.0


# int8 values and weights: how they are distributed decides what fits into 16 bits.
PATTERNS = {
    "normal": lambda M, K, N: (torch.randn(M, K).mul(36).clamp(-127, 127), torch.randn(N, K)),
    "uniform": lambda M, K, N: (torch.randint(-128, 128, (M, K)), torch.rand(N, K) * 2 - 1),
    "largest": lambda M, K, N: (torch.full((M, K), 127), torch.ones(N, K)),
    "smallest": lambda M, K, N: (torch.full((M, K), -128), -torch.ones(N, K)),
    "opposite": lambda M, K, N: (torch.full((M, K), -127), torch.ones(N, K)),
    "signs": lambda M, K, N: (signs(M, K) * 127, signs(N, K)),
    "aligned": lambda M, K, N: (signs(1, K).expand(M, K) * 127, signs(1, K).expand(N, K)),
    "sparse": lambda M, K, N: ((torch.rand(M, K) < 0.02) * 127, torch.randn(N, K)),
    "a few loud rows": lambda M, K, N: (
        torch.where(torch.arange(M)[:, None] % 5 == 0, 127, torch.randint(-30, 30, (M, K))),
        torch.randn(N, K),
    ),
    "zeros": lambda M, K, N: (torch.zeros(M, K), torch.zeros(N, K)),
}


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sums_of_products_are_exact(pattern, size, instructions):
    if not extension.LOADED:
        pytest.skip("there is no compiled extension")
    best = extension.build_facts()["instruction_set"]
    if not extension._C.use_instruction_set(instructions):
        pytest.skip(f"this machine does not run {instructions}")
    try:
        values, matrix = PATTERNS[pattern](*size)
        values, weight = values.to(torch.int8), ops.quantize_weight(matrix)
        ones = torch.ones(size[0])
        y = ops.quantized_linear(values, weight, x_scales=ones, backend="native")
        exact = values.double() @ weight.rows().double().T
        assert torch.equal(y, exact.float() * weight.scales)
    finally:
        extension._C.use_instruction_set(best)


@pytest.mark.parametrize("shape", [(3, 1), (16, 16), (35, 77), (33, 100)])
def test_tiles_hold_the_rows(shape):
    matrix = torch.randn(shape)
    weight = ops.quantize_weight(matrix)
    assert weight.shape == shape and weight.rows().shape == shape
    assert (weight.dequantized() - matrix).abs().amax() <= weight.scales.amax() * 0.51
    assert torch.equal(weight.to("cpu").values, weight.values)
    size = weight.values.numel() + weight.limits.nbytes  # nothing is held twice
    assert size <= (-(-shape[0] // 16) * 16) * (-(-shape[1] // 16) * 16) * 1.6


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_relative_error_on_normal_data(backend):
    x, matrix = torch.randn(256, 2240), torch.randn(300, 2240)
    exact = F.linear(x.double(), matrix.double())
    y = ops.quantized_linear(x, ops.quantize_weight(matrix), backend=backend)
    assert (y - exact).norm() / exact.norm() < 0.012


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_input_is_the_same_as_quantizing_inside(backend, dtype):
    x, weight = torch.randn(2, 9, 77), ops.quantize_weight(torch.randn(20, 77))
    scales = x.abs().amax(-1) / 127
    values = (x / scales[..., None]).round().to(torch.int8)
    bias = torch.randn(20, dtype=dtype)
    outside = ops.quantized_linear(
        values, weight, bias, x_scales=scales, dtype=dtype, backend=backend
    )
    inside = ops.quantized_linear(x, weight, bias, dtype=dtype, backend=backend)
    assert torch.equal(outside, inside) and inside.dtype == dtype


def test_zero_tokens_give_the_bias_and_leading_dimensions_are_kept():
    weight, bias = ops.quantize_weight(torch.randn(5, 12)), torch.randn(5)
    y = ops.quantized_linear(torch.zeros(2, 1, 3, 12), weight, bias)
    assert torch.equal(y, bias.expand(2, 1, 3, 5))
    assert ops.quantized_linear(torch.randn(12), weight).shape == (5,)
    assert ops.quantized_linear(torch.randn(0, 12), weight).shape == (0, 5)


def test_float8_runs_on_eager():
    x, matrix, bias = torch.randn(40, 64), torch.randn(24, 64), torch.randn(24)
    weight = ops.quantize_weight(matrix, FP8)
    assert weight.values.dtype == FP8
    y, exact = ops.quantized_linear(x, weight, bias), F.linear(x, matrix, bias)
    assert (y - exact).norm() / exact.norm() < 0.05
    with pytest.raises(BackendUnavailable, match="no float8 kernel for the CPU"):
        ops.quantized_linear(x, weight, backend="native")


@pytest.mark.parametrize("tokens", [0, 1, 17, 40])
def test_the_products_that_cuda_runs(tokens):
    """PyTorch has them on the CPU too, only slowly."""
    matrix, bias, x = torch.randn(24, 64), torch.randn(24), torch.randn(2, tokens, 64)
    tiles = ops.quantize_weight(matrix)
    plain = ops.QuantizedWeight(tiles.rows(), tiles.scales, None, (24, 64), torch.int8)
    y = sys.modules["clipflow.ops.quantized_linear"]._cuda(x, plain, bias, None, torch.float32)
    torch.testing.assert_close(y, ops.quantized_linear(x, plain, bias, backend="eager"))


@pytest.mark.parametrize(
    ("matrix", "dtype", "error", "words"),
    [
        (torch.zeros(4), torch.int8, ShapeError, r"weight must be \[N, K\], got \[4\]"),
        (torch.zeros(0, 4), torch.int8, ShapeError, r"1 <= K <= 131072, got \[0, 4\]"),
        (torch.zeros(1, 131073), torch.int8, ShapeError, r"got \[1, 131073\]"),
        (torch.zeros(4, 4).int(), torch.int8, TypeError, "weight must be float32"),
        (torch.zeros(4, 4), torch.uint8, TypeError, "dtype must be one of .* got torch.uint8"),
        (torch.full((4, 4), torch.nan), torch.int8, ValueError, "weight must be finite"),
        (torch.full((4, 4), torch.inf), FP8, ValueError, "weight must be finite"),
    ],
)
def test_quantize_weight_says_what_is_wrong(matrix, dtype, error, words):
    with pytest.raises(error, match=words):
        ops.quantize_weight(matrix, dtype)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.zeros(3, 8)}, TypeError, "weight must be a QuantizedWeight, .* Tensor"),
        ({"x": torch.zeros(2, 7)}, ShapeError, r"x must be \[\.\.\., 8\], got \[2, 7\]"),
        ({"x": torch.zeros(())}, ShapeError, r"x must be \[\.\.\., 8\], got \[\]"),
        ({"x": torch.zeros(2, 8).int()}, TypeError, "x must be float32"),
        ({"x": torch.zeros(2, 8, device="meta")}, TypeError, "weight must be on meta"),
        ({"x": torch.zeros(2, 8).char()}, TypeError, "x must be float32"),
        ({"x_scales": torch.ones(2)}, TypeError, "x with x_scales must be torch.int8"),
        ({"bias": torch.zeros(8)}, ShapeError, r"bias must be \[3\], got \[8\]"),
        ({"bias": torch.zeros(3).int()}, TypeError, "bias must be float32"),
        ({"bias": torch.zeros(3, device="meta")}, TypeError, "bias must be on cpu"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of .* got torch.int8"),
        ({"x": torch.zeros(2, 8, requires_grad=True)}, RuntimeError, "has no gradient"),
        ({"backend": "triton"}, BackendUnavailable, "is not one of"),
    ],
)
def test_quantized_linear_says_what_is_wrong(change, error, words):
    call = {"x": torch.zeros(2, 8), "weight": ops.quantize_weight(torch.randn(3, 8))}
    with pytest.raises(error, match=words):
        ops.quantized_linear(**{**call, **change})


@pytest.mark.parametrize(
    ("scales", "error", "words"),
    [
        (torch.ones(3), ShapeError, r"x_scales must be \[2\], got \[3\]"),
        (torch.ones(2, dtype=torch.float64), TypeError, "x_scales must be torch.float32"),
    ],
)
def test_scales_of_quantized_input_are_checked(scales, error, words):
    weight = ops.quantize_weight(torch.randn(3, 8))
    with pytest.raises(error, match=words):
        ops.quantized_linear(torch.zeros(2, 8).char(), weight, x_scales=scales)
