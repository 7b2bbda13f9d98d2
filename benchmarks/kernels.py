"""List registers, spills, shared memory and theoretical occupancy of every GPU kernel, with no GPU.

Run: python benchmarks/kernels.py [--archs 80,90a] [--no-cuda] [--json FILE]

Triton kernels are compiled ahead of time for the launches of each op's largest promised case; CUDA
kernels by nvcc. Occupancy is the share of a multiprocessor's warps that registers, shared memory
and block size leave room for; a CUDA kernel's block is taken at its smallest, 4 warps.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import cuda_build
from benchmarks.machine import write_result
from clipflow.ops import all_ops

# Of one multiprocessor, by compute capability: warps, shared KiB (CUDA programming guide, table of
# technical specifications). All have 65,536 registers.
LIMITS = {
    80: (64, 164), 86: (48, 100), 89: (48, 100), 90: (64, 228), 100: (64, 228), 120: (48, 100),
}  # fmt: skip
REGISTERS = 65_536
SMALLEST_CUDA_BLOCK = 128


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default="80,90a", help="e.g. 80,86,89,90a,100a,120")
    parser.add_argument("--no-cuda", action="store_true", help="Triton kernels only")
    parser.add_argument("--json", type=Path, help="result file; default: a dated one in results/")
    args = parser.parse_args(argv)
    archs = tuple(args.archs.split(","))
    unknown = [arch for arch in archs if capability_of(arch) not in LIMITS]
    if unknown:
        print(f"kernels: --archs must be of {sorted(LIMITS)}, got {unknown}", file=sys.stderr)
        return 2

    rows = triton_rows(archs)
    if not args.no_cuda:
        rows += cuda_rows(archs)
    for row in rows:
        print(
            f"{row['compiler']:<8}{row['kernel']:<56}{row['arch']:<8}"
            f"{row['registers']:>4} registers"
            f"{row['spilled_bytes']:>5} B spilled{row['shared_bytes']:>7} B shared"
            f"{row['occupancy']:>5.0%} occupancy"
        )
    print(write_result("kernels", {"archs": archs, "rows": rows}, args.json))
    return 1 if any(row["spilled_bytes"] for row in rows) else 0


def capability_of(arch: str) -> int:
    """90 of "90a"."""
    found = re.fullmatch(r"(\d+)[af]?", arch)
    return int(found[1]) if found else 0


def triton_rows(archs: tuple[str, ...]) -> list[dict[str, object]]:
    if find_spec("triton") is None:
        print("Triton is not installed: its kernels are left out", file=sys.stderr)
        return []
    from benchmarks.triton_aot import compile_launch, largest_launches  # needs Triton

    rows = []
    for op in (op for op in all_ops() if "triton" in op.backends):
        for dtype in (torch.float32, torch.bfloat16):
            for launch in largest_launches(op, dtype):
                for arch in archs:
                    found = vars(compile_launch(launch, capability_of(arch))[0]).copy()
                    found["kernel"] += f" {str(dtype).removeprefix('torch.')}"
                    rows.append(with_occupancy("triton", found))
    return rows


def cuda_rows(archs: tuple[str, ...]) -> list[dict[str, object]]:
    if cuda_build.find_nvcc() is None and not cuda_build.extension_is_current(archs):
        print("nvcc is not installed: the CUDA kernels are left out", file=sys.stderr)
        return []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for source in cuda_build.sources():
            for kernel in cuda_build.kernels_of(source, archs, Path(folder)):
                found = {**vars(kernel), "kernel": kernel.name, "threads": SMALLEST_CUDA_BLOCK}
                del found["sass"], found["name"]
                rows.append(with_occupancy("nvcc", found))
    return rows


def with_occupancy(compiler: str, row: dict[str, object]) -> dict[str, object]:
    capability = capability_of(row["arch"].removeprefix("sm_"))
    share = occupancy(row["registers"], row["shared_bytes"], row["threads"], capability)
    return {"compiler": compiler, **row, "occupancy": share}


def occupancy(registers: int, shared_bytes: int, threads: int, capability: int) -> float:
    """Resident warps of a multiprocessor over the most it can hold."""
    most_warps, shared_kib = LIMITS[capability]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out 256 at a time
    blocks = min(most_warps // warps, REGISTERS // per_warp // warps)
    blocks = min(blocks, shared_kib * 1024 // (shared_bytes + 1024))  # 1 KiB is the system's
    return blocks * warps / most_warps


if __name__ == "__main__":
    sys.exit(main())
