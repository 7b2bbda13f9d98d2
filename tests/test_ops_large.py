"""More than 2**31 elements, where a 32-bit index would have gone wrong, on the CPU."""

import gc
from pathlib import Path

import pytest
import torch

from clipflow import extension, ops
from clipflow.registry import TRITON_INTERPRETED

GIGABYTE = 2**30
MEMORY = Path("/proc/meminfo")


def free_memory() -> int:
    if not MEMORY.exists():
        return 0
    fields = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


@pytest.fixture(autouse=True)
def room():
    """Skip where there is none for the tensors and what else runs."""
    if TRITON_INTERPRETED or not extension.LOADED:
        pytest.skip("large tensors are for compiled kernels")
    if free_memory() < 12 * GIGABYTE:
        pytest.skip(f"needs 12 GB of free memory, has {free_memory() / GIGABYTE:.1f}")
    torch.utils.deterministic.fill_uninitialized_memory = False  # conftest.py turns it on
    yield
    gc.collect()


def zeros_but_last(rows: int, channels: int) -> torch.Tensor:
    """[1, rows, channels] bfloat16; zeros are pages that the system need not even give."""
    x = torch.zeros(1, rows, channels, dtype=torch.bfloat16)
    x[:, -3:] = torch.randn(3, channels)
    return x


def test_adaln_norm():
    x = zeros_but_last(2**31 // 4096 + 3, 4096)
    shift, scale = torch.randn(2, 1, 4096, dtype=torch.bfloat16).unbind(0)
    y = ops.adaln_norm(x, shift, scale, backend="native")[:, -3:]
    torch.testing.assert_close(y, ops.adaln_norm(x[:, -3:], shift, scale, backend="eager"))


def test_clip_normalize():
    x = zeros_but_last(2**31 // 4096 + 3, 4096)
    y = ops.clip_normalize(x, mode="layer", backend="native")[:, -3:]
    torch.testing.assert_close(y, ops.clip_normalize(x[:, -3:], mode="layer", backend="eager"))


def test_flow_interpolate():
    """In place, as the compiled op may be called: four tensors of this size would not fit."""
    data, noise = zeros_but_last(2**31 // 4096 + 3, 4096), zeros_but_last(2**31 // 4096 + 3, 4096)
    last = data[:, -3:].clone(), noise[:, -3:].clone()
    sigmas = torch.tensor([0.3])
    torch.ops.clipflow.flow_interpolate(data, noise, sigmas, data, noise)
    for one, other in zip(
        (data, noise), ops.flow_interpolate(*last, sigmas, backend="eager"), strict=True
    ):
        assert torch.equal(one[:, -3:], other)
