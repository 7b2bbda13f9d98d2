"""Every Triton kernel compiles for GPUs that are not here, down to machine code without spills."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY))

from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.triton_aot import compile_launch, largest_launches, op_launches  # noqa: E402
from clipflow.ops import all_ops  # noqa: E402

FILES = sorted(path.stem for path in (REPOSITORY / "kernels" / "triton").glob("[!_]*.py"))
OPS = {op.name: op for op in all_ops()}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Kernels are compiled, not found in a cache of an earlier run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FILES)
def test_compiles_without_spills(name, dtype, capability, record_property):
    for launch in largest_launches(OPS[name], dtype):
        resources, code = compile_launch(launch, capability)
        assert code[:4] == b"\x7fELF"
        record_property(resources.kernel, str(resources))
        print(resources)
        assert resources.spilled_bytes == 0, str(resources)
        assert resources.shared_bytes <= 48 * 1024, str(resources)


@pytest.mark.parametrize("name", FILES)
def test_every_kernel_of_the_file_was_launched(name):
    """A kernel that no launcher reaches would pass the test above unseen."""
    module = importlib.import_module(f"clipflow.kernels.triton.{name}")
    kernels = {key for key, value in vars(module).items() if isinstance(value, JITFunction)}
    launched = {launch.kernel.fn.__name__ for launch in op_launches(OPS[name], torch.float32)}
    assert launched == {kernel for kernel in kernels if not kernel.startswith("_")}
