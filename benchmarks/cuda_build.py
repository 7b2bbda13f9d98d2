"""Compile the CUDA sources with nvcc, without a GPU, and read what each kernel takes.

Only for tests and tables: the extension itself is built by CMake from the same flags.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
_COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class CudaKernel:
    """One kernel for one architecture, with its machine instructions."""

    name: str  # as in the source, e.g. adaln_norm_fwd_kernel<float, 4, 2>
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    sass: str


def sources() -> list[Path]:
    return sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))


def find_nvcc() -> str | None:
    """The CUDA compiler: on PATH, or in CUDA_HOME or the usual folder."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def build(source: Path, archs: tuple[str, ...], folder: Path) -> list[CudaKernel]:
    """Compile `source` for `archs`, e.g. ("80", "90a"), into `folder`.

    Raises:
        RuntimeError: nvcc is not installed or refuses the source (the text has its messages).
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("cuda_build: nvcc must be on PATH or in CUDA_HOME/bin, found neither")
    kernels = []
    for arch in archs:
        cubin = folder / f"{source.stem}.sm_{arch}.cubin"
        command = [nvcc, *_flags(), f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stderr}")
        kernels += _kernels(done.stderr, _sass(nvcc, cubin))
    return kernels


def _flags() -> list[str]:
    cmake = (REPOSITORY / "CMakeLists.txt").read_text()
    target = re.search(r"TORCH_TARGET_VERSION=\w+", cmake)
    if target is None:
        raise RuntimeError("CMakeLists.txt must define TORCH_TARGET_VERSION")
    include = Path(torch.__file__).parent / "include"
    folders = [
        REPOSITORY / "csrc",
        include,
        include / "torch" / "csrc" / "api" / "include",
        Path(sysconfig.get_path("include")),
    ]
    return ["-O3", "-std=c++20", "-Xptxas", "-v", f"-D{target[0]}", *(f"-I{f}" for f in folders)]


def _kernels(ptxas_log: str, sass: dict[str, str]) -> list[CudaKernel]:
    """Read `ptxas -v`: for each entry its name and architecture, then spills, then registers."""
    kernels = []
    parts = _COMPILING.split(ptxas_log)[1:]
    names = _demangled(parts[0::3])
    for name, mangled, arch, text in zip(names, parts[0::3], parts[1::3], parts[2::3], strict=True):
        shared = _SHARED.search(text)
        kernels.append(
            CudaKernel(
                name=name,
                arch=arch,
                registers=int(_USED.search(text)[1]),
                spilled_bytes=sum(int(n) for n in _SPILLS.search(text).groups()),
                shared_bytes=int(shared[1]) if shared else 0,
                sass=sass[mangled],
            )
        )
    return kernels


def _demangled(names: list[str]) -> list[str]:
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    # "void clipflow::(anonymous namespace)::kernel<float, 4>(float const*, ...)" -> "kernel<...>"
    return [re.sub(r"^.*?::(?=\w+(<|\())|\(.*$", "", line.replace("(anonymous namespace)::", ""))
            for line in text.splitlines()]  # fmt: skip


def _sass(nvcc: str, cubin: Path) -> dict[str, str]:
    """Machine instructions by mangled kernel name."""
    tool = shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent)) or _triton_cuobjdump()
    text = subprocess.run(
        [tool, "-sass", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    parts = re.split(r"\n\s*Function : (\S+)", text)[1:]
    return dict(zip(parts[0::2], parts[1::2], strict=True))


def _triton_cuobjdump() -> str:
    from benchmarks.triton_aot import CUOBJDUMP  # nvcc without its binary tools: Triton brings one

    return str(CUOBJDUMP)
