"""What the ops take beside their outputs, on the CPU: at most a megabyte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peak_of_ops import CLEAR_REFS, compiled, least_peak_of

from clipflow.ops import all_ops
from clipflow.registry import TRITON_INTERPRETED

MEGABYTE = 2**20
# The kernel counts pages processor by processor and adds the counts up now and then.
SLACK = MEGABYTE // 4 * (os.cpu_count() or 1)

pytestmark = pytest.mark.skipif(
    TRITON_INTERPRETED or not os.access(CLEAR_REFS, os.W_OK),
    reason="measures compiled kernels by Linux's peak of the resident memory, which it resets",
)


def test_an_op_takes_its_outputs_and_a_megabyte():
    script = Path(__file__).with_name("peak_of_ops.py")
    here = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {op.name for op in all_ops() if compiled(op)} != set()
    beside = {name: peak - output for name, (peak, output) in found.items()}
    assert {name: b for name, b in beside.items() if b > MEGABYTE + SLACK} == {}


def test_the_measure_sees_what_is_freed_again():
    x = torch.ones(8 * MEGABYTE)
    (x + 1).sum()
    peak, result = least_peak_of(lambda: (x + 1).mul_(2).sum())
    assert peak >= x.nbytes - SLACK
    assert result.item() == 4 * x.numel()
