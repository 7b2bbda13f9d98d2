"""What qk_norm_rope says of bad input, and what it means, beside the tests of every op."""

import math

import pytest
import torch
import torch.nn.functional as F

from clipflow import ops
from clipflow.errors import BackendUnavailable, ShapeError
from clipflow.nn.embeddings import rope_table_1d, rope_table_2d


def call(**change: object) -> dict[str, object]:
    table = (torch.ones(5, 4), torch.zeros(5, 4))
    arguments = {"q": torch.zeros(2, 5, 3, 8), "k": torch.zeros(2, 5, 1, 8), "q_rope": table}
    return arguments | change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 5, 8)}, ShapeError, r"q must be \[B, L, H, K\], got \[2, 5, 8\]"),
        ({"k": torch.zeros(2, 5, 8)}, ShapeError, r"k must be \[B, S, Hk, K\], got \[2, 5, 8\]"),
        ({"k": torch.zeros(1, 5, 1, 8)}, ShapeError, r"k must be \[2, 5, 1, 8\], got \[1, 5"),
        ({"k": torch.zeros(2, 5, 1, 6)}, ShapeError, r"k must be \[2, 5, 1, 8\], got \[2, 5, 1, 6"),
        (
            {"q": torch.zeros(2, 5, 3, 7), "k": torch.zeros(2, 5, 3, 7)},
            ShapeError,
            r"q must be \[B, L, H, K\] with K even, got \[2, 5, 3, 7\]",
        ),
        ({"q_weight": torch.zeros(24)}, ShapeError, r"q_weight must be \[8\], got \[24\]"),
        (
            {"q_weight": torch.zeros(8), "across_heads": True},
            ShapeError,
            r"q_weight must be \[24\], got \[8\]",
        ),
        ({"k_bias": torch.zeros(9)}, ShapeError, r"k_bias must be \[8\], got \[9\]"),
        (
            {"k_rope": (torch.zeros(5, 8), torch.zeros(5, 8))},
            ShapeError,
            r"k_rope cos must be \[5, 4\], got \[5, 8\]",
        ),
        (
            {"q_rope": (torch.zeros(5, 4), torch.zeros(5, 4).double())},
            TypeError,
            "q_rope sin must be torch.float32 on cpu, got torch.float64",
        ),
        ({"q": torch.zeros(2, 5, 3, 8, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"k": torch.zeros(2, 5, 1, 8).half()}, TypeError, "k must be torch.float32 on cpu as q"),
        ({"k": torch.zeros(2, 5, 1, 8, device="meta")}, TypeError, "on meta"),
        ({"q_weight": torch.zeros(8).double()}, TypeError, "q_weight must be torch.float32"),
        ({"norm": "l2"}, ValueError, "norm must be one of none, rms, layer, got 'l2'"),
        (
            {"norm": "none", "k_weight": torch.zeros(8)},
            ValueError,
            "k_weight must be None with norm 'none', got a tensor",
        ),
        ({"backend": "cuda"}, BackendUnavailable, "'cuda' is not one of"),
    ],
)
def test_qk_norm_rope_says_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        ops.qk_norm_rope(**call(**change))


def test_table_1d_turns_pair_m_by_its_own_frequency():
    cos, sin = rope_table_1d(50, 16)
    assert cos.shape == sin.shape == (50, 8)
    assert cos.dtype is torch.float32
    assert math.isclose(sin[7, 3], math.sin(7 * 10000 ** (-6 / 16)), rel_tol=1e-6)
    assert math.isclose(cos[49, 1], math.cos(49 * 10000 ** (-2 / 16)), rel_tol=1e-6)


def test_table_2d_turns_even_pairs_by_row_and_odd_ones_by_column():
    cos, sin = rope_table_2d(3, 5, 16)
    assert cos.shape == sin.shape == (15, 8)
    place = 2 * 5 + 4  # row 2, column 4
    for i in range(4):
        frequency = 10000 ** (-i / 4)
        assert math.isclose(cos[place, 2 * i], math.cos(2 * frequency), rel_tol=1e-6)
        assert math.isclose(sin[place, 2 * i + 1], math.sin(4 * frequency), rel_tol=1e-6)


def test_rotation_of_neighbors_is_a_complex_product():
    q, k = torch.randn(2, 6, 3, 16), torch.randn(2, 6, 3, 16)
    cos, sin = rope_table_2d(2, 3, 16)
    turned, same = ops.qk_norm_rope(q, k, q_rope=(cos, sin), norm="none", interleaved=True)
    as_complex = torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(as_complex * torch.complex(cos, sin)[:, None]).flatten(-2)
    torch.testing.assert_close(turned, expected)
    assert torch.equal(same, k)


def test_products_of_queries_and_keys_tell_distance_alone():
    table = rope_table_1d(32, 64)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    q, k = q.expand(1, 32, 1, 64), k.expand(1, 32, 1, 64)
    q, k = ops.qk_norm_rope(q, k, q_rope=table, k_rope=table)
    scores = q[0, :, 0] @ k[0, :, 0].T
    for distance in range(-31, 32):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)


def test_lumina_normalizes_over_all_heads_and_turns_queries_only():
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 7, 3, 8)
    weight, bias = torch.randn(24), torch.randn(24)
    _, normed = ops.qk_norm_rope(
        q,
        k,
        weight,
        weight,
        bias,
        bias,
        q_rope=rope_table_2d(2, 2, 8),
        norm="layer",
        across_heads=True,
        interleaved=True,
        eps=1e-5,
    )
    expected = F.layer_norm(k.flatten(2), (24,), weight, bias, 1e-5).view(k.shape)
    torch.testing.assert_close(normed, expected)


def test_queries_alone():
    q, table = torch.randn(2, 5, 3, 8), rope_table_1d(5, 8)
    turned, none = ops.qk_norm_rope(q, q[:, :0], q_rope=table)
    assert none.shape == (2, 0, 3, 8)
    assert torch.equal(turned, ops.qk_norm_rope(q, q, q_rope=table)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_outputs_past_the_caches_are_complete(dtype, interleaved):
    """Large outputs are streamed: each value must have been written, with the same bits."""
    heads, width = 12, 128
    q, k = torch.randn(2, 2100, 2 * heads, width, dtype=dtype).chunk(2, dim=2)
    table = rope_table_1d(2100, width)
    options = {"q_rope": table, "interleaved": interleaved}
    whole = ops.qk_norm_rope(q, k, **options)[0]
    one = ops.qk_norm_rope(q[1:], k[1:, :0], **options)[0]
    assert torch.equal(whole[1:], one)
    eager = ops.qk_norm_rope(q, k, **options, backend="eager")[0]
    torch.testing.assert_close(whole, eager)
