"""What the ops take beside their outputs, on the CPU: at most a megabyte."""

import os

import pytest
import torch
from peak_memory import can_reset_its_peak, least_peak_of, measured_by
from peak_of_ops import compiled_ops

from clipflow.registry import TRITON_INTERPRETED

MEGABYTE = 2**20
# The kernel counts pages processor by processor and adds the counts up now and then.
SLACK = MEGABYTE // 4 * (os.cpu_count() or 1)

pytestmark = pytest.mark.skipif(
    TRITON_INTERPRETED or not can_reset_its_peak(),
    reason="measures compiled kernels by Linux's peak of the resident memory, which it resets",
)


@pytest.mark.skipif(not compiled_ops(), reason="no compiled kernel for the CPU")
def test_an_op_takes_its_outputs_and_a_megabyte():
    found = measured_by("peak_of_ops.py")
    assert found.keys() == {op.name for op in compiled_ops()}
    beside = {name: peak - outputs for name, (peak, outputs) in found.items()}
    assert {name: b for name, b in beside.items() if b > MEGABYTE + SLACK} == {}


def test_the_measure_sees_what_is_freed_again():
    x = torch.ones(8 * MEGABYTE)
    (x + 1).sum()
    peak, result = least_peak_of(lambda: (x + 1).mul_(2).sum())
    assert peak >= x.nbytes - SLACK
    assert result.item() == 4 * x.numel()
