"""What the ops take beside their outputs, on the CPU: at most a megabyte."""

import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch
from op_calls import run

from clipflow.ops import all_ops
from clipflow.registry import TRITON_INTERPRETED

MEGABYTE = 2**20
# The kernel counts pages processor by processor and adds the counts up now and then.
SLACK = MEGABYTE // 4 * (os.cpu_count() or 1)
CLEAR_REFS = Path("/proc/self/clear_refs")

pytestmark = pytest.mark.skipif(
    TRITON_INTERPRETED or not os.access(CLEAR_REFS, os.W_OK),
    reason="measures compiled kernels by Linux's peak of the resident memory, which it resets",
)


def resident(line: str) -> int:
    """Bytes of "VmRSS" (now) or "VmHWM" (peak since the last reset)."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(line):
            return int(text.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have {line}")


def peak_of(call) -> tuple[int, object]:
    """The most memory that `call` held at a time, and what it returned."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not used again unseen
    CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    result = call()
    return resident("VmHWM") - before, result


def bytes_of(result) -> int:
    tensors = (result,) if isinstance(result, torch.Tensor) else result
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_an_op_takes_its_outputs_and_a_megabyte(op):
    cpu = torch.device("cpu")
    if "native" not in op.backends or op.refusal(torch.empty(1), "native"):
        pytest.skip("no compiled kernel for the CPU")
    case = op.timed[-1]
    inputs = case.inputs(cpu, torch.float32)
    with torch.no_grad():
        run(op, op.cases[0], op.cases[0].inputs(cpu, torch.float32), "native")
        run(op, case, inputs, "native")  # threads and libraries begin
        peak, result = peak_of(lambda: run(op, case, inputs, "native"))
    assert peak <= bytes_of(result) + MEGABYTE + SLACK


def test_the_measure_sees_what_is_freed_again():
    x = torch.ones(8 * MEGABYTE)
    (x + 1).sum()
    peak, result = peak_of(lambda: (x + 1).mul_(2).sum())
    assert peak >= x.nbytes - SLACK
    assert result.item() == 4 * x.numel()
