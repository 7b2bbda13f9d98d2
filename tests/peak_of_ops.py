"""Measures what ops take beside their outputs. Run by test_ops_memory.py in a process of its own:
other tests leave threads behind, whose memory would be counted.

Prints {op: [most bytes held during a call, bytes of its outputs]}.
"""

import ctypes
import gc
import json
from pathlib import Path

import torch
from op_calls import run

from clipflow.ops import all_ops
from clipflow.registry import Op

CLEAR_REFS = Path("/proc/self/clear_refs")


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


def least_peak_of(call) -> tuple[int, object]:
    """Of three calls: what a call needs is in every peak, pages read from a file are in one."""
    peaks = []
    for _ in range(3):
        peak, result = peak_of(call)
        peaks.append(peak)
    return min(peaks), result


def bytes_of(result) -> int:
    tensors = (result,) if isinstance(result, torch.Tensor) else result
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def compiled(op: Op) -> bool:
    """Whether the op has a compiled kernel for the CPU."""
    return "native" in op.backends and not op.refusal(torch.empty(1), "native")


def measured(op: Op) -> tuple[int, int]:
    """The most bytes held during a call of the largest timed size, and those of its outputs."""
    cpu = torch.device("cpu")
    case = op.timed[-1]
    inputs = case.inputs(cpu, torch.float32)
    with torch.no_grad():
        run(op, op.cases[0], op.cases[0].inputs(cpu, torch.float32), "native")
        run(op, case, inputs, "native")  # threads and libraries begin
        peak, result = least_peak_of(lambda: run(op, case, inputs, "native"))
    return peak, bytes_of(result)


if __name__ == "__main__":
    print(json.dumps({op.name: measured(op) for op in all_ops() if compiled(op)}))
