"""What was built, and what a wheel of it would hold."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clipflow
from clipflow import extension, ops

ROOT = Path(__file__).resolve().parents[1]


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(re.findall(r"\w+", info.read_text())) if info.exists() else set()


def test_extension_is_built_where_a_compiler_is():
    if shutil.which("c++") is None:
        pytest.skip("there is no compiler: the installation is pure Python")
    assert extension.LOADED, "run `make test` or `pip install --no-build-isolation -e .`"


@pytest.mark.skipif(not extension.LOADED, reason="there is no compiled extension")
def test_build_facts():
    facts = extension.build_facts()
    assert facts["compiler"]
    assert facts["instruction_set"] in facts["instruction_sets"]
    assert bool(facts["cuda_archs"]) == bool(facts["cuda_compiler"])
    assert all(re.fullmatch(r"\d+[af]?", arch) for arch in facts["cuda_archs"])
    flags = cpu_flags()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        assert facts["instruction_set"] == "avx512"
    elif {"avx2", "fma"} <= flags:
        assert facts["instruction_set"] == "avx2"


@pytest.mark.skipif(not extension.LOADED, reason="there is no compiled extension")
def test_every_native_op_has_a_kernel_where_its_source_is():
    for op in ops.all_ops():
        for folder, suffix, device in (("cpu", "cpp", "cpu"), ("cuda", "cu", "cuda")):
            source = ROOT / "csrc" / folder / f"{op.name}.{suffix}"
            built = device == "cpu" or extension.build_facts()["cuda_archs"]
            if source.exists() and built:
                for name in op.schemas:
                    assert device in extension.native_devices(name), name


def test_triton_kernels_are_found_as_a_part_of_the_package():
    assert importlib.util.find_spec("clipflow.kernels.triton.adaln_norm") is not None


def test_version_is_the_same_everywhere():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{clipflow.__version__}"' in project


def test_constraints_satisfy_the_bounds():
    """Every dependency is pinned, so that two machines install the same."""
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )  # fmt: skip
    names = {name.lower() for name in pinned}
    block = re.search(
        r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    for requirement in re.findall(r'"([\w-]+)>=', block[1]):
        assert requirement in names, f"{requirement} is not in constraints.txt"


def test_import_needs_neither_transformers_nor_diffusers():
    program = (
        "import sys, clipflow, clipflow.ops; "
        "print([m for m in ('transformers', 'diffusers', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
