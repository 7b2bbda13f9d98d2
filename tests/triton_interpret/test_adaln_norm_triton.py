"""adaln_norm's Triton kernels in Triton's interpreter, on CPU tensors: values and each gradient.

Run: TRITON_INTERPRET=1 pytest tests/triton_interpret  (its own process: Triton decides at import)
"""

import pytest
import torch
from clipflow.kernels.triton import adaln_norm as kernel
from torch import Tensor

from clipflow.modulation import gain
from clipflow.ops.adaln_norm import adaln_norm, reference

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One channel; one token; several rows a program with a masked tail; sizes off every power of two;
# more chunks than one in the backward; a DiT's width; the widest row.
SHAPES = [(2, 5, 1), (1, 1, 8), (3, 17, 77), (2, 64, 192), (2, 70, 33), (1, 3, 1152), (1, 2, 8192)]


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """A kernel that leaves an output element unwritten shows it as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(B: int, L: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and shift and scale as a DiT passes them: two of six chunks of one table."""
    table = torch.randn(B, 6 * D, dtype=dtype).chunk(6, dim=-1)
    return torch.randn(B, L, D, dtype=dtype), table[1], table[3]


def eager_values(inputs: tuple[Tensor, ...], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and the three gradients of the reference, computed from `inputs` cast to `dtype`."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out = reference(*leaves, eps=EPS)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def assert_as_close_as_eager(name: str, actual: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Allow twice the error that eager PyTorch has, in the same dtype, against float64."""
    assert actual.dtype == eager.dtype
    assert actual.shape == eager.shape
    error = (actual.double() - truth).abs().max()
    eager_error = (eager.double() - truth).abs().max()
    floor = torch.finfo(actual.dtype).eps * truth.abs().max()
    assert error <= 2 * eager_error + floor, f"{name}: {error:.3e}, eager {eager_error:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_each_gradient(shape, dtype):
    inputs = make_inputs(*shape, dtype)
    grad = torch.randn(shape, dtype=dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    assert leaves[1].stride(0) == 6 * shape[2]
    out = adaln_norm(*leaves, eps=EPS, backend="triton")
    actual = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    rows = zip(
        ("y", "d_x", "d_shift", "d_scale"),
        actual,
        eager_values(inputs, grad, dtype),
        eager_values(inputs, grad, torch.float64),
        strict=True,
    )
    for row in rows:
        assert_as_close_as_eager(*row)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_empty_batch(shape):
    x, shift, scale = make_inputs(*shape, torch.float32)
    assert kernel.forward(x, shift, scale, None, None, False, EPS).shape == shape
    d_x, d_offset, d_gain = kernel.backward(x, x, gain(scale, None, None), False, EPS)
    assert d_x.shape == shape
    for gradient in (d_offset, d_gain):
        torch.testing.assert_close(gradient, torch.zeros(shape[0], shape[2]))


def test_non_contiguous_tokens():
    x, shift, scale = make_inputs(2, 6, 40, torch.float32)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    actual = adaln_norm(strided, shift, scale, backend="triton")
    assert torch.equal(actual, adaln_norm(x, shift, scale, backend="triton"))


@pytest.mark.parametrize("D", [48, 1030])
def test_a_sample_does_not_depend_on_its_batch(D):
    """Bitwise, gradients of the modulation included: no order of summing depends on B."""
    x, shift, scale = make_inputs(3, 21, D, torch.float32)
    grad = torch.randn_like(x)
    scales = gain(scale, None, None)
    together = [
        kernel.forward(x, shift, scale, None, None, False, EPS),
        *kernel.backward(grad, x, scales, False, EPS),
    ]
    one = slice(1, 2)
    alone = [
        kernel.forward(x[one], shift[one], scale[one], None, None, False, EPS),
        *kernel.backward(grad[one], x[one], scales[one], False, EPS),
    ]
    for whole, single in zip(together, alone, strict=True):
        assert torch.equal(whole[one], single)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_where_eager_is_not(bad):
    x, shift, scale = make_inputs(2, 4, 24, torch.float32)
    x[1, 2, 5] = bad
    shift[0, 3] = bad
    actual = adaln_norm(x, shift, scale, backend="triton")
    expected = reference(x, shift, scale, eps=EPS)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_constant_rows_with_eps_zero():
    """Zero variance: NaN as in eager where there are tokens, and nothing from rows past the end."""
    x, shift, scale = make_inputs(1, 5, 24, torch.float32)
    x[0, 3] = 2.0
    grad = torch.randn_like(x)
    actual = kernel.backward(grad, x, gain(scale, None, None), False, 0.0)[0]
    kept = [0, 1, 2, 4]
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(reference(leaf, shift, scale, eps=0.0), leaf, grad)[0]
    torch.testing.assert_close(actual[:, kept], expected[:, kept])
    assert not actual[0, 3].isfinite().any()
