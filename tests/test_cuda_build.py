"""nvcc builds every CUDA source without a GPU; no kernel spills; vector kernels move 16 bytes."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.cuda_build import CudaKernel, find_nvcc, kernels_of, sources

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
ARCHS = ("80", "90a")
ITEM_BYTES = {"float": 4, "__half": 2, "__nv_bfloat16": 2}


@pytest.fixture(scope="module", params=sources(), ids=lambda path: path.name)
def kernels(request, tmp_path_factory) -> list[CudaKernel]:
    return kernels_of(request.param, ARCHS, tmp_path_factory.mktemp("cubin"))


def is_vector(kernel: CudaKernel) -> bool:
    """Whether the kernel's first two template arguments say elements that fill 16 bytes."""
    found = re.match(r"\w+<(\w+), (\d+)[,>]", kernel.name)
    return found is not None and ITEM_BYTES[found[1]] * int(found[2]) == 16


def test_every_architecture_has_every_kernel(kernels):
    names = [{k.name for k in kernels if k.arch == f"sm_{arch}"} for arch in ARCHS]
    assert names[0]
    assert names[0] == names[1]


def test_no_kernel_spills(kernels):
    spilled = {(k.name, k.arch): k.spilled_bytes for k in kernels if k.spilled_bytes}
    assert not spilled
    for kernel in kernels:
        assert not re.search(r"\b(LDL|STL)\b", kernel.sass), f"{kernel.name} uses local memory"


def test_vector_kernels_load_and_store_16_bytes(kernels):
    vector = [kernel for kernel in kernels if is_vector(kernel)]
    assert vector
    for kernel in vector:
        assert re.search(r"\bLDG\S*\.128", kernel.sass), f"{kernel.name} loads narrowly"
        # 8-bit results of a 16-byte load are narrower.
        if "quant" not in kernel.name:
            assert re.search(r"\bSTG\S*\.128", kernel.sass), f"{kernel.name} stores narrowly"
