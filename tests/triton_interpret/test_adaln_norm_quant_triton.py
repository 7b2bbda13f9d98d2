"""float8_e4m3fn of adaln_norm_quant in Triton's interpreter, where it is made of its bits.

Run: TRITON_INTERPRET=1 pytest tests/triton_interpret  (its own process: Triton decides at import)
"""

import pytest
import torch
import triton
import triton.language as tl
from clipflow.kernels.triton import adaln_norm_quant as kernel

from clipflow.ops.adaln_norm_quant import adaln_norm_quant

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 4096


@triton.jit
def convert_kernel(x_ptr, bits_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(bits_ptr + at, kernel._e4m3_bits(tl.load(x_ptr + at)))


def test_bits_are_those_of_pytorch():
    """Every bfloat16 up to 448, which has every tie, and float32 numbers just beside the ties."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    numbers = torch.where(numbers.abs() > 448, torch.nan, numbers)
    beside = (numbers.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1])).to(torch.int32)
    x = beside.view(torch.float32)
    x = torch.where(x.abs() > 448, torch.nan, x).flatten()
    assert x.numel() % BLOCK == 0
    bits = torch.empty(x.numel(), dtype=torch.uint8)
    convert_kernel[(x.numel() // BLOCK,)](x, bits, BLOCK=BLOCK)
    expected = x.to(FLOAT8).view(torch.uint8)
    same = (bits == expected) | (x.isnan() & (bits & 0x7F == 0x7F))
    assert same.all(), (x[~same][:5], bits[~same][:5], expected[~same][:5])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_float8_values_and_scales(dtype):
    x, shift, scale = torch.randn(2, 5, 77), torch.randn(2, 77), torch.randn(2, 77)
    x[0, 1], shift[0] = 0, 0
    inputs = [t.to(dtype) for t in (x, shift, scale)]
    values, scales = adaln_norm_quant(*inputs, dtype=FLOAT8, backend="triton")
    expected, expected_scales = adaln_norm_quant(*inputs, dtype=FLOAT8, backend="eager")
    assert values.dtype == FLOAT8
    torch.testing.assert_close(scales, expected_scales)
    # A quotient at a tie may fall to either side.
    step = expected.float().abs() / 8 + 2**-9
    assert ((values.float() - expected.float()).abs() <= step).all()
    assert (values.float() == expected.float()).float().mean() > 0.99


def test_not_finite():
    x, shift, scale = torch.randn(1, 4, 24), torch.zeros(1, 24), torch.zeros(1, 24)
    x[0, 1, 3], x[0, 2, 5] = torch.nan, torch.inf
    for dtype in (torch.int8, FLOAT8):
        values, scales = adaln_norm_quant(x, shift, scale, dtype=dtype, backend="triton")
        assert scales.isnan().tolist() == [[False, True, True, False]]
        assert values.dtype == dtype
