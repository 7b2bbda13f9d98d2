"""Meaning and errors of glu_conv, beside the tests of every op in test_ops.py."""

import pytest
import torch
import torch.nn.functional as F

from clipflow import extension, ops
from clipflow.errors import ShapeError

BACKENDS = ["eager", "native"] if extension.LOADED else ["eager"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_sees_its_neighbors_on_the_grid_and_no_further(backend):
    x = torch.zeros(1, 5 * 7, 2)
    x[0, 2 * 7 + 3] = 1.0  # row 2, column 3
    taps = torch.arange(1.0, 10.0).view(1, 1, 3, 3).expand(2, 1, 3, 3)
    y = ops.glu_conv(x, taps, torch.zeros(2), (5, 7), backend=backend).view(5, 7)
    seen = taps[0, 0].flip(0, 1)  # the token lies on the other side of its neighbors
    expected = F.pad(seen * F.silu(seen), (2, 2, 1, 1))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ends_of_a_row_are_no_neighbors(backend):
    x = torch.zeros(1, 6, 2)
    x[0, 2] = 1.0  # the end of the first of two rows
    y = ops.glu_conv(x, torch.ones(2, 1, 3, 3), torch.zeros(2), (2, 3), backend=backend)
    torch.testing.assert_close(y[0, :, 0].ne(0).nonzero()[:, 0], torch.tensor([1, 2, 4, 5]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_may_lie_any_stride_apart(backend):
    wide, weight, bias = torch.randn(2, 12, 40), torch.randn(10, 1, 3, 3), torch.randn(10)
    swapped = wide.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (wide[..., 3:13], swapped[..., :10], wide[:1, :1, :10].expand(2, 12, 10)):
        y = ops.glu_conv(x, weight, bias, (3, 4), backend=backend)
        same = ops.glu_conv(x.contiguous(), weight, bias, (3, 4), backend=backend)
        torch.testing.assert_close(y, same)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_exponential_is_exact_over_its_whole_range(name, dtype):
    """With a convolution that only copies, y = SiLU(x) for every exponent there is."""
    if not extension.LOADED:
        pytest.skip("there is no compiled extension")
    best = extension.build_facts()["instruction_set"]
    if not extension._C.use_instruction_set(name):
        pytest.skip(f"this machine does not run {name}")
    try:
        most = 88.7 if dtype == torch.float32 else 709.7
        gate = torch.linspace(-most, most, 200_001, dtype=torch.float64).to(dtype)
        x = torch.stack([torch.ones_like(gate), gate], dim=-1)[None]
        copy = torch.zeros(2, 1, 3, 3, dtype=dtype)
        copy[:, :, 1, 1] = 1.0
        grid = (len(gate), 1)
        y = ops.glu_conv(x, copy, copy.new_zeros(2), grid, backend="native")[0, :, 0]
        wide = gate.double()
        exact = wide / (1 + torch.exp(-wide))
        ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
        assert ((y.double() - exact).abs() / ulp).max() <= 2.0
    finally:
        extension._C.use_instruction_set(best)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(12, 8)}, ShapeError, r"x must be \[B, h\*w, 2M\], got \[12, 8\]"),
        ({"x": torch.zeros(2, 11, 8)}, ShapeError, r"x must be \[B, 3\*4, 2M\], got \[2, 11, 8\]"),
        ({"x": torch.zeros(2, 12, 7)}, ShapeError, r"x must be \[B, 3\*4, 2M\], got \[2, 12, 7\]"),
        ({"x": torch.zeros(2, 12, 8, dtype=torch.int32)}, TypeError, "x must be float32"),
        ({"weight": torch.zeros(8, 3, 3)}, ShapeError, r"weight must be \[8, 1, 3, 3\]"),
        ({"weight": torch.zeros(8, 1, 5, 5)}, ShapeError, r"weight must be \[8, 1, 3, 3\]"),
        ({"weight": torch.zeros(8, 1, 3, 3).half()}, TypeError, "weight must be torch.float32"),
        ({"bias": torch.zeros(4)}, ShapeError, r"bias must be \[8\], got \[4\]"),
        ({"bias": torch.zeros(8, device="meta")}, TypeError, "bias must be torch.float32 on cpu"),
        ({"grid": (0, 12)}, ShapeError, r"grid must be \(h, w\), each at least 1, got \(0, 12\)"),
        ({"grid": (-3, -4)}, ShapeError, "grid must be"),
    ],
)
def test_glu_conv_says_what_is_wrong(change, error, words):
    call = {
        "x": torch.zeros(2, 12, 8),
        "weight": torch.zeros(8, 1, 3, 3),
        "bias": torch.zeros(8),
        "grid": (3, 4),
    }
    with pytest.raises(error, match=words):
        ops.glu_conv(**(call | change))
