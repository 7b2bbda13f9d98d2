"""A whole UniLIP of true size with random weights: load, draw, edit; and a race with the reference.

Run: python benchmarks/unilip.py [--size 1b] [--folder DIR] [--quick]

First the folder (written if there is none) is loaded in bfloat16 as stored, then in float32, and
draws and edits to files at 2 steps; each part is timed beside its useful FLOPs. Then 4 pictures of
one prompt are drawn with 4 blocks of the transformer, by the reference's loop and by ours, paired
and in turn. `--quick` takes the tiny model.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.machine import ceilings, keep_freed_memory, write_result
from benchmarks.unilip_parts import measure_parts
from benchmarks.unilip_race import race

STEPS = 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="unilip", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("1b", "3b", "tiny"), default="1b")
    parser.add_argument("--folder", type=Path, help="of that size; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=3, help="of the race (default: 3)")
    parser.add_argument("--quick", action="store_true", help="the tiny model, few steps")
    parser.add_argument("--json", type=Path, help="result file; default: a dated one in results/")
    args = parser.parse_args(argv)
    size = "tiny" if args.quick else args.size
    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or written(Path(place) / "model", size)
        keep_freed_memory()
        body = {"size": size, "steps": STEPS, **measure_parts(folder, size, STEPS)}
        body["peak_gb"] = peak_gb()
        limits = ceilings(torch.device("cpu"), torch.float32, quick=True)
        body["race"] = race(folder, steps=3 if args.quick else 20, rounds=args.rounds)
    print(write_result("unilip", {"ceilings": limits, **body}, args.json))
    return 1 if body["race"]["wrong"] else 0


def written(folder: Path, size: str) -> Path:
    """A folder of published form; written by another process, for the peak memory of this one."""
    command = [sys.executable, "-m", "clipflow.testing", str(folder), "--size", size]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])
    return folder


def peak_gb() -> float:
    """Most memory that this process ever held, 10^9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    sys.exit(main())
