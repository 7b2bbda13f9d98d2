"""What adaln_norm says of bad input and of images, beside the tests of every op in test_ops.py."""

import pytest
import torch

from clipflow import ops
from clipflow.errors import BackendUnavailable, ShapeError


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"x": torch.zeros(2, 8)},
            ShapeError,
            r"x must be \[B, L, D\] or \[B, H, W, D\], got \[2, 8\]",
        ),
        ({"shift": torch.zeros(2, 7)}, ShapeError, r"shift must be \[2, 8\], got \[2, 7\]"),
        (
            {"scale": torch.zeros(1, 8)},
            ShapeError,
            r"scale must be \[2, 8\] or \[2, 5, 8\], got \[1, 8\]",
        ),
        (
            {"scale": torch.zeros(2, 5, 8)},
            ShapeError,
            r"shift must be \[2, 5, 8\], got \[2, 8\]",
        ),
        ({"weight": torch.zeros(7)}, ShapeError, r"weight must be \[8\], got \[7\]"),
        ({"table": torch.zeros(8)}, ShapeError, r"table must be \[2, 8\], got \[8\]"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"scale": torch.zeros(2, 8).double()}, TypeError, "scale must be torch.float32"),
        ({"weight": torch.zeros(8).double()}, TypeError, "weight must be torch.float32"),
        ({"shift": torch.zeros(2, 8, device="meta")}, TypeError, "on meta"),
        ({"table": torch.zeros(2, 8, device="meta")}, TypeError, "on meta"),
        ({"norm": "batch"}, ValueError, "norm must be one of layer, rms, got 'batch'"),
        ({"backend": "cuda"}, BackendUnavailable, "'cuda' is not one of"),
    ],
)
def test_adaln_norm_says_what_is_wrong(change, error, words):
    call = {"x": torch.zeros(2, 5, 8), "shift": torch.zeros(2, 8), "scale": torch.zeros(2, 8)}
    with pytest.raises(error, match=words):
        ops.adaln_norm(**call | change)


def test_an_image_gives_the_bits_of_its_tokens_and_stays_channels_last():
    image = torch.randn(2, 24, 5, 3).contiguous(memory_format=torch.channels_last)
    shift, scale = torch.randn(2, 24), torch.randn(2, 24)
    out = ops.adaln_norm(image.permute(0, 2, 3, 1), shift, scale)
    tokens = ops.adaln_norm(image.flatten(2).transpose(1, 2), shift, scale)
    assert torch.equal(out.flatten(1, 2), tokens)
    assert out.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


def test_modulation_of_tokens_that_is_the_same_for_all_has_the_bits_of_that_of_samples():
    x, modulation = torch.randn(2, 7, 40), torch.randn(2, 1, 80)
    samples = ops.adaln_norm(x, *modulation[:, 0].chunk(2, dim=-1))
    tokens = ops.adaln_norm(x, *modulation.expand(2, 7, 80).chunk(2, dim=-1))
    assert torch.equal(samples, tokens)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_large_outputs_have_the_bits_of_small_ones(backend):
    """Outputs of 16 MB and more are written past the caches."""
    x, shift, scale = torch.randn(1, 2240, 2240), torch.randn(1, 2240), torch.randn(1, 2240)
    if ops.explain("adaln_norm", x).refusals[backend]:
        pytest.skip(f"{backend} is not here")
    whole = ops.adaln_norm(x, shift, scale, backend=backend)
    part = ops.adaln_norm(x[:, 2000:2100], shift, scale, backend=backend)
    assert torch.equal(whole[:, 2000:2100], part)
