"""What a number was measured on: machine, versions, ceilings; and the dated file it is kept in."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.timing import interleaved

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "diffusers", "liger-kernel", "xformers")


def facts() -> dict[str, object]:
    """Processor, threads, GPU, versions and commit, as they are now."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    """The processor's own name; `platform` only knows its architecture on Linux."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None


def keep_freed_memory() -> None:
    """Make glibc hand freed memory out again instead of unmapping it.

    Otherwise each result above 32 MB is mapped anew and the system zeroes it page by page, which
    took ten times as long as the kernel under test. Applies to all contenders alike.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool) -> dict[str, float]:
    """Copy bandwidth (read + write, far larger than any cache) and GEMM rate of this run."""
    on_gpu = device.type == "cuda"
    elements = (1 << 30 if on_gpu else 1 << 26) // dtype.itemsize
    side = 8192 if on_gpu else 1024
    source = torch.randn(elements, device=device).to(dtype)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = interleaved(
        {"copy": lambda: target.copy_(source), "gemm": lambda: left @ right},
        rounds=2 if quick else 5,
        block_seconds=0.05 if quick else 0.3,
        device=device,
    )
    return {
        "copy_gb_per_s": 2 * source.nbytes / min(times["copy"].wall) / 1e9,
        "gemm_gflop_per_s": 2 * side**3 / min(times["gemm"].wall) / 1e9,
    }


def write_result(kind: str, body: dict[str, object], path: Path | None) -> Path:
    """Write `body` with machine, date and command as JSON; by default a dated file in results/."""
    now = datetime.datetime.now(datetime.timezone.utc)
    path = path or RESULTS / f"{now:%Y-%m-%d-%H%M%S}-{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"kind": kind, "date": f"{now:%Y-%m-%d %H:%M} UTC", "command": _command()}
    path.write_text(json.dumps({**head, "machine": facts(), **body}, indent=1) + "\n")
    return path


def _command() -> str:
    program = Path(sys.argv[0])
    name = f"python benchmarks/{program.name}" if program.suffix == ".py" else program.name
    return " ".join([name, *sys.argv[1:]])
