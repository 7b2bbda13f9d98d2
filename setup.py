"""Build the extension with CMake and Ninja; without a compiler, install pure Python.

CLIPFLOW_CUDA_ARCHS, e.g. "80;90a", names the CUDA architectures to compile for. Without it, CUDA is
compiled for the GPU of this machine if there is one, and otherwise not at all.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str | None:
    """`name` beside this Python (where pip puts cmake and ninja), else on the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, candidates) if found), None)


def missing_tools() -> list[str]:
    """What stops this machine from compiling the extension."""
    found = {"a C++ compiler": compiler(), "cmake": tool("cmake"), "ninja": tool("ninja")}
    found |= {package: importlib.util.find_spec(package) for package in ("pybind11", "torch")}
    return [name for name, where in found.items() if where is None]


def cuda_archs() -> str:
    """CUDA architectures to compile for, separated by semicolons; "" for none."""
    named = os.environ.get("CLIPFLOW_CUDA_ARCHS")
    nvcc = tool("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if named is not None:
        archs = ";".join(named.replace(",", ";").split(";"))
        if archs and nvcc is None:
            raise SystemExit(f"CLIPFLOW_CUDA_ARCHS is {named!r}, but nvcc was not found")
        return archs
    if nvcc is None or shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    found = sorted({line.strip().replace(".", "") for line in answer.stdout.splitlines()})
    # 9.0 and 10.x have instructions that only their "a" targets may use.
    return ";".join(a + "a" if a in ("90", "100", "103") else a for a in found if a.isdigit())


class CMakeBuild(build_ext):
    """Configure, build and install clipflow._C where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        torch_dir = Path(importlib.util.find_spec("torch").origin).parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = cuda_archs()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_INSTALL_PREFIX": target.parent,
            "CLIPFLOW_TORCH_DIR": torch_dir,
            "CLIPFLOW_TORCH_VERSION": version("torch"),
            "CLIPFLOW_PYTHON_INCLUDE": sysconfig.get_paths()["include"],
            "CLIPFLOW_PYBIND11_INCLUDE": pybind11.get_include(),
            "CLIPFLOW_EXTENSION_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "CLIPFLOW_CUDA_ARCHS": archs,
        }
        if archs and tool("nvcc") is None:
            options["CMAKE_CUDA_COMPILER"] = "/usr/local/cuda/bin/nvcc"
        print(f"clipflow: CUDA architectures: {archs or 'none (CPU only)'}", file=sys.stderr)
        defines = [f"-D{name}={value}" for name, value in options.items()]
        cmake = [tool("cmake")]
        subprocess.check_call([*cmake, "-S", ROOT, "-B", folder, "-GNinja", *defines])
        subprocess.check_call([*cmake, "--build", folder])
        subprocess.check_call([*cmake, "--install", folder])


missing = missing_tools()
if missing:
    print(
        f"clipflow: not compiling the extension, for want of {', '.join(missing)}. "
        "Everything works without it, on plain PyTorch; the fused kernels are left out.",
        file=sys.stderr,
    )

setup(
    # The Triton kernels lie beside csrc/, and are installed as clipflow.kernels.triton.
    packages=[*find_packages(include=["clipflow", "clipflow.*"]), "clipflow.kernels.triton"],
    package_dir={"clipflow.kernels.triton": "kernels/triton"},
    package_data={
        "clipflow": ["assets/**/*", "recipes/**/*.yaml"],
        "clipflow.kernels.triton": ["configs.json"],
    },
    ext_modules=[] if missing else [Extension("clipflow._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
