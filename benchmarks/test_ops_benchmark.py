"""The same cases as benchmarks/ops.py under pytest-benchmark, for its history and compare tools.

Run: pytest benchmarks --benchmark-only [-k adaln_norm] [--benchmark-autosave]
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import backends_of, error_meter, special_peers
from benchmarks.machine import keep_freed_memory
from clipflow.ops import all_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRID = [
    pytest.param(op, case, name, id=f"{op.name}-{case.name}-{name}")
    for op in all_ops()
    for case in op.timed
    for name in op.order
    if op.refusal(torch.empty(1, device=DEVICE), name) is None
]


@pytest.fixture(autouse=True, scope="session")
def allocator():
    keep_freed_memory()


def timed(benchmark, call):
    def synchronized():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark(synchronized)


@pytest.mark.parametrize(("op", "case", "backend"), GRID)
def test_backend(benchmark, op, case, backend):
    torch.manual_seed(0)
    inputs = case.inputs(DEVICE, torch.float32)
    benchmark.group = f"{op.name} {case.name}"
    with torch.no_grad():
        call = backends_of(op, case, inputs)[backend]
        error, allowed = error_meter(op, case, inputs)(call())
    assert error <= allowed, "wrong results are not timed"
    timed(benchmark, call)


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_peers(benchmark, op):
    """The peers of benchmarks/peers/, at the op's first timed case."""
    torch.manual_seed(0)
    case = op.timed[0]
    peers = special_peers(op, case, case.inputs(DEVICE, torch.float32))
    if not peers:
        pytest.skip("no peers beside eager and torch.compile")
    benchmark.group = f"{op.name} {case.name}"
    name, call = next(iter(peers.items()))
    benchmark.name = name
    timed(benchmark, call)
