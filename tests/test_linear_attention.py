"""Meaning and errors of linear_attention, beside the tests of every op in test_ops.py."""

import pytest
import torch

from clipflow import ops
from clipflow.errors import ShapeError

WILLING = ["eager", "native"]


def qkv(*shape):
    return tuple(torch.randn(shape) for _ in range(3))


def refused(backend):
    return ops.explain("linear_attention", torch.empty(1)).refusals[backend]


@pytest.fixture(params=WILLING)
def backend(request):
    if refused(request.param):
        pytest.skip(refused(request.param))
    return request.param


def test_weights_are_products_of_rectified_queries_and_keys(backend):
    q, k, v = qkv(2, 70, 3, 8)
    weights = torch.einsum("bihk,bjhk->bhij", q.relu(), k.relu())
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-15)
    expected = torch.einsum("bhij,bjhk->bihk", weights, v)
    y = ops.linear_attention(q, k, v, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_one_token_gives_its_value(backend):
    q, k, v = qkv(3, 1, 4, 32)
    y = ops.linear_attention(q.abs(), k.abs(), v, backend=backend)
    torch.testing.assert_close(y, v)


def test_a_token_without_positive_weight_gives_zero(backend):
    q, k, v = (t.requires_grad_() for t in qkv(1, 6, 2, 16))
    y = ops.linear_attention(-q.abs(), k, v, backend=backend)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (q, k, v))


@pytest.mark.parametrize("shape", [(2, 0, 3, 16), (0, 5, 3, 16)])
def test_nothing_gives_nothing(backend, shape):
    leaves = tuple(t.requires_grad_() for t in qkv(*shape))
    y = ops.linear_attention(*leaves, backend=backend)
    y.sum().backward()
    assert y.shape == shape
    assert all(t.grad.shape == shape for t in leaves)


def test_both_packed_forms_are_read_where_they_lie(backend):
    q, k, v = qkv(2, 65, 4, 32)
    plain = ops.linear_attention(q, k, v, backend=backend)
    packed = torch.stack([q, k, v], dim=2).flatten(2).unflatten(-1, (3, 4, 32)).unbind(2)
    grouped = torch.stack([q, k, v], dim=3).flatten(2).unflatten(-1, (4, 3, 32)).unbind(3)
    for views in (packed, grouped):
        assert not views[0].is_contiguous()
        y = ops.linear_attention(*views, backend=backend)
        assert y.is_contiguous()
        torch.testing.assert_close(y, plain)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 5, 6)}, ShapeError, r"q must be \[B, N, H, K\], got \[2, 5, 6\]"),
        ({"k": torch.zeros(2, 5, 3, 4)}, ShapeError, r"k must be \[2, 5, 3, 8\], got"),
        ({"v": torch.zeros(2, 4, 3, 8)}, ShapeError, r"v must be \[2, 5, 3, 8\], got"),
        ({"q": torch.zeros(2, 5, 3, 8, dtype=torch.int32)}, TypeError, "q must be float32"),
        ({"k": torch.zeros(2, 5, 3, 8).half()}, TypeError, "k must be torch.float32 on cpu as q"),
        (
            {"v": torch.zeros(2, 5, 3, 8, device="meta")},
            TypeError,
            "v must be torch.float32 on",
        ),
    ],
)
def test_linear_attention_says_what_is_wrong(change, error, words):
    inputs = {name: torch.zeros(2, 5, 3, 8) for name in "qkv"} | change
    with pytest.raises(error, match=words):
        ops.linear_attention(**inputs)
