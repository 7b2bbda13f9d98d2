"""Time what a newcomer waits for: importing clipflow, a picture from a fresh process, a warm one.

Run: python benchmarks/startup.py [--quick] [--model scenes]

Every number comes from a process of its own, with its peak memory, against the bar it is held to.
Imports are timed in A-B-B-A order, `import torch` against `import torch, clipflow`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import write_result

IMPORT_BAR_S = 1.0
GENERATE_BAR_S = 12.0
WARM_IMAGE_BAR_S = 1.0
MEMORY_BAR_GB = 1.2
PROMPT = "a red circle left of a blue square"

# The model and prompt are arguments; prints seconds of one image once everything is warm.
WARM_IMAGE = """
import sys, time
from clipflow import CLIPFlowPipeline
pipe = CLIPFlowPipeline.from_pretrained(sys.argv[1])
pipe(sys.argv[2])
start = time.perf_counter()
pipe(sys.argv[2])
print("seconds", time.perf_counter() - start)
"""


class Failed(RuntimeError):
    """A process that was to be timed ended with an error; the text is what it said last."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="startup", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--quick", action="store_true", help="one round of each")
    parser.add_argument("--json", type=Path, help="result file; default: a dated one in results/")
    args = parser.parse_args(argv)
    rounds = 1 if args.quick else 5

    rows = []
    for measure in (import_rows, generate_rows, warm_rows):
        try:
            rows += measure(args.model, rounds)
        except Failed as failure:
            rows.append({"name": measure.__name__.removesuffix("_rows"), "failed": str(failure)})
    for row in rows:
        print(row_text(row))
    print(write_result("startup", {"model": args.model, "rounds": rounds, "rows": rows}, args.json))
    return 1 if any("failed" in row for row in rows) else 0


def import_rows(_: str, rounds: int) -> list[dict[str, object]]:
    """Median seconds that `import clipflow` adds to `import torch`, paired by round.

    Also in processor time, as wall time on a busy machine measures the neighbors too.
    """
    wall, cpu = [], []
    for _ in range(rounds):
        codes = ("import torch", "import torch, clipflow")
        runs = [timed([sys.executable, "-c", code]) for code in (*codes, *reversed(codes))]
        wall.append((runs[1].wall + runs[2].wall - runs[0].wall - runs[3].wall) / 2)
        cpu.append((runs[1].cpu + runs[2].cpu - runs[0].cpu - runs[3].cpu) / 2)
    name = "import clipflow over import torch"
    return [
        row(name, statistics.median(wall), "s", IMPORT_BAR_S),
        row(f"{name}, cpu", statistics.median(cpu), "s", IMPORT_BAR_S),
    ]


def generate_rows(model: str, rounds: int) -> list[dict[str, object]]:
    """Process start to written file, and the process's peak memory."""
    seconds, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.png"
        for _ in range(rounds):
            command = [sys.executable, "-m", "clipflow.cli", "generate", PROMPT]
            process = timed([*command, "--model", model, "-o", str(file)])
            if not file.is_file():
                raise Failed("clipflow generate wrote no file")
            file.unlink()
            seconds.append(process.wall)
            memory.append(process.peak_gb)
    return [
        row("clipflow generate, start to file", statistics.median(seconds), "s", GENERATE_BAR_S),
        row("clipflow generate, peak memory", max(memory), "GB", MEMORY_BAR_GB),
    ]


def warm_rows(model: str, rounds: int) -> list[dict[str, object]]:
    """One image in a process that has drawn one already."""
    seconds = []
    for _ in range(rounds):
        output = timed([sys.executable, "-c", WARM_IMAGE, model, PROMPT]).output
        seconds.append(float(output.rsplit("seconds", 1)[1]))
    return [row("one image in a warm process", statistics.median(seconds), "s", WARM_IMAGE_BAR_S)]


class Process(NamedTuple):
    """A finished process: seconds by the wall and of processors, peak resident memory, output."""

    wall: float
    cpu: float
    peak_gb: float
    output: str


def timed(command: list[str]) -> Process:
    """Run a process to its end.

    Raises:
        Failed: its exit status is not 0.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)  # waits, with this one process's memory
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            err.seek(0)
            last = (err.read().strip() or "no message").splitlines()[-1]
            raise Failed(f"exit status {process.returncode}: {last}")
        out.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
        cpu = usage.ru_utime + usage.ru_stime
        return Process(wall, cpu, usage.ru_maxrss * unit / 1e9, out.read())


def row(name: str, value: float, unit: str, bar: float) -> dict[str, object]:
    return {"name": name, "value": value, "unit": unit, "bar": bar, "met": value <= bar}


def row_text(row: dict[str, object]) -> str:
    if "failed" in row:
        return f"{row['name']:<44}FAILED: {row['failed']}"
    verdict = "met" if row["met"] else "MISSED"
    value = f"{row['value']:8.2f} {row['unit']}"
    return f"{row['name']:<44}{value:<12} at most {row['bar']} {row['unit']}: {verdict}"


if __name__ == "__main__":
    sys.exit(main())
