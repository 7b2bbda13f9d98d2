"""Prints what ops hold in a call, {op: [peak, its outputs]} in bytes; run by test_ops_memory."""

import json

import torch
from op_calls import run
from peak_memory import least_peak_of

from clipflow.ops import all_ops
from clipflow.registry import Op


def bytes_of(result) -> int:
    tensors = (result,) if isinstance(result, torch.Tensor) else result
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def compiled_ops() -> list[Op]:
    """Those with a compiled kernel for the CPU."""
    x = torch.empty(1)
    return [op for op in all_ops() if "native" in op.backends and not op.refusal(x, "native")]


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
    print(json.dumps({op.name: measured(op) for op in compiled_ops()}))
