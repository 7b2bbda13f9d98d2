"""Meaning and errors of dit_attention, beside the tests of every op in test_ops.py."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F

from clipflow import ops
from clipflow.errors import BackendUnavailable, ShapeError

WILLING = ["eager", "native"]


def qkv(B=2, L=9, S=20, H=4, G=4, K=16):
    return torch.randn(B, L, H, K), torch.randn(B, S, G, K), torch.randn(B, S, G, K)


@pytest.mark.parametrize("backend", WILLING)
def test_it_is_softmax_attention(backend):
    q, k, v = qkv()
    plain = (t.transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*plain, scale=0.3).transpose(1, 2)
    y = ops.dit_attention(q, k, v, scale=0.3, backend=backend)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", WILLING)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_key_lengths_are_as_good_as_cutting(backend, dtype):
    q, k, v = qkv()
    y = ops.dit_attention(q, k, v, key_lengths=torch.tensor([0, 17], dtype=dtype), backend=backend)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    cut = ops.dit_attention(q[1:], k[1:, :17], v[1:, :17], backend=backend)
    torch.testing.assert_close(y[1:], cut)


@pytest.mark.parametrize("backend", WILLING)
def test_padding_has_no_gradient(backend):
    leaves = tuple(t.requires_grad_() for t in qkv())
    y = ops.dit_attention(*leaves, key_lengths=torch.tensor([0, 17]), backend=backend)
    y.square().sum().backward()
    q, k, v = leaves
    assert not any(t.grad.isnan().any() for t in leaves)
    assert not q.grad[0].any() and not k.grad[0].any() and not v.grad[1, 17:].any()
    assert k.grad[1, :17].any()


@pytest.mark.parametrize("backend", WILLING)
def test_heads_share_keys_in_groups_of_neighbors(backend):
    q, k, v = qkv(H=6, G=2)
    whole = ops.dit_attention(q, *(t.repeat_interleave(3, dim=2) for t in (k, v)), backend="eager")
    torch.testing.assert_close(ops.dit_attention(q, k, v, backend=backend), whole)


@pytest.mark.parametrize("backend", WILLING)
@pytest.mark.parametrize("sizes", [{"S": 0}, {"L": 0}, {"B": 0}], ids=str)
def test_nothing_to_attend_to_gives_zeros(backend, sizes):
    q, k, v = qkv(**sizes)
    y = ops.dit_attention(q, k, v, backend=backend)
    assert torch.equal(y, torch.zeros_like(q))


@pytest.mark.parametrize("package", ["flash-attn", "xformers"])
def test_a_missing_package_is_named(package):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    with pytest.raises(BackendUnavailable, match=f"needs the package {package}, which is not ins"):
        ops.dit_attention(*qkv(), backend=package)


def test_triton_says_how_wide_heads_may_be():
    with pytest.raises(BackendUnavailable, match="head widths up to 128, got 160"):
        ops.dit_attention(*qkv(K=160), backend="triton")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 9, 64)}, ShapeError, r"q must be \[B, L, H, K\], got \[2, 9, 64\]"),
        ({"k": torch.zeros(2, 20, 3, 16)}, ShapeError, "H = 4 a multiple of G"),
        ({"k": torch.zeros(2, 20, 0, 16)}, ShapeError, "H = 4 a multiple of G"),
        ({"k": torch.zeros(1, 20, 4, 16)}, ShapeError, r"k must be \[2, S, G, 16\]"),
        ({"k": torch.zeros(2, 20, 4, 8)}, ShapeError, r"k must be \[2, S, G, 16\]"),
        ({"v": torch.zeros(2, 21, 4, 16)}, ShapeError, r"v must be \[2, 20, 4, 16\], got"),
        ({"q": torch.zeros(2, 9, 4, 16, dtype=torch.int32)}, TypeError, "q must be float32"),
        ({"k": torch.zeros(2, 20, 4, 16).half()}, TypeError, "k must be torch.float32 on cpu as q"),
        ({"key_lengths": torch.tensor([1])}, ShapeError, r"key_lengths must be \[2\], got \[1\]"),
        ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths must be int64 or int32, got"),
        ({"key_lengths": torch.ones(2, dtype=torch.int64, device="meta")}, TypeError, "be on cpu"),
    ],
)
def test_dit_attention_says_what_is_wrong(change, error, words):
    inputs = dict(zip("qkv", qkv(), strict=True)) | change
    with pytest.raises(error, match=words):
        ops.dit_attention(**inputs)
