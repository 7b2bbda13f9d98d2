"""What each CUDA kernel takes, read without a GPU.

From the extension if it is up to date and has the wanted architectures, as in CI; else each source
is compiled with nvcc, by the flags that CMake uses.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from clipflow import extension

REPOSITORY = Path(__file__).resolve().parents[1]
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


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


def kernels_of(source: Path, archs: tuple[str, ...], folder: Path) -> list[CudaKernel]:
    """The kernels of `source` for `archs`, e.g. ("80", "90a"); `folder` is for what is compiled.

    Raises:
        RuntimeError: nvcc is needed, and is not installed or refuses the source.
    """
    if extension_is_current(archs):
        found = _read(Path(extension._C.__file__), archs)
        return [kernel for kernel in found if kernel.name.startswith(source.stem)]
    return build(source, archs, folder)


def extension_is_current(archs: tuple[str, ...]) -> bool:
    """Whether the extension holds kernels for `archs` made from the sources as they are now."""
    if not set(archs) <= set(extension.build_facts().get("cuda_archs", ())):
        return False
    files = [*REPOSITORY.glob("csrc/**/*"), REPOSITORY / "CMakeLists.txt"]
    newest = max(path.stat().st_mtime for path in files)
    return Path(extension._C.__file__).stat().st_mtime >= newest


def build(source: Path, archs: tuple[str, ...], folder: Path) -> list[CudaKernel]:
    """Compile `source` for `archs` into `folder`.

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
        kernels += _read(cubin, (arch,))
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
    return ["-O3", "-std=c++20", f"-D{target[0]}", *(f"-I{f}" for f in folders)]


@functools.cache  # reading the whole extension takes many seconds
def _read(binary: Path, archs: tuple[str, ...]) -> list[CudaKernel]:
    """Resources and instructions of every kernel in a cubin or a library."""
    sass = {
        (arch, name): text
        for arch, code in _by_arch("-sass", binary, archs)
        for name, text in _functions(code)
    }
    resources = [
        (arch, found.groups())
        for arch, text in _by_arch("-res-usage", binary, archs)
        for found in _RESOURCES.finditer(text)
    ]
    names = _demangled([mangled for _, (mangled, *_) in resources])
    return [
        CudaKernel(
            name=name,
            arch=arch,
            registers=int(registers),
            spilled_bytes=int(stack),  # no kernel has a stack frame but for spills
            shared_bytes=int(shared),
            sass=sass[arch, mangled],
        )
        for name, (arch, (mangled, registers, stack, shared)) in zip(names, resources, strict=True)
    ]


def _by_arch(option: str, binary: Path, archs: tuple[str, ...]) -> list[tuple[str, str]]:
    """(architecture, text) for each of `archs`, as cuobjdump prints them."""
    text = subprocess.run(
        [_cuobjdump(), option, str(binary)], check=True, capture_output=True, text=True
    ).stdout
    if binary.suffix == ".cubin":
        return [(f"sm_{archs[0]}", text)]
    parts = re.split(r"\narch = (sm_\w+)\n", text)[1:]
    wanted = {f"sm_{arch}" for arch in archs}
    pairs = zip(parts[0::2], parts[1::2], strict=True)
    return [(arch, code) for arch, code in pairs if arch in wanted]


def _functions(code: str) -> list[tuple[str, str]]:
    """(mangled name, machine instructions) of each kernel."""
    parts = re.split(r"\n\s*Function : (\S+)", code)[1:]
    return list(zip(parts[0::2], parts[1::2], strict=True))


def _demangled(names: list[str]) -> list[str]:
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    # "void clipflow::(anonymous namespace)::kernel<float, 4>(float const*, ...)" -> "kernel<...>"
    return [re.sub(r"^.*?::(?=\w+(<|\())|\(.*$", "", line.replace("(anonymous namespace)::", ""))
            for line in text.splitlines()]  # fmt: skip


def _cuobjdump() -> str:
    beside = shutil.which("cuobjdump", path=str(Path(find_nvcc() or "/").resolve().parent))
    if beside is not None:
        return beside
    from benchmarks.triton_aot import CUOBJDUMP  # nvcc without its binary tools: Triton brings one

    return str(CUOBJDUMP)
