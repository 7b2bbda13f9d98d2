"""Time and peak memory of loading a published folder, beside a plain safetensors read of its bytes.

Run: python benchmarks/loading.py [--rounds N] [--folder DIR] [--json FILE]

The plain read is `safetensors.torch.load_file` and a clone of each tensor, which touches every
byte. Without --folder a random one of 2 GB is written, with the sizes of UniLIP-1B at about half
its depth. Each load is a process of its own that has everything imported and has loaded the
embedded model; contenders alternate in A-B-B-A rounds, with the files in the system's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import write_result
from clipflow.models.unilip.published import unilip_1b_config

TIME_BAR, MEMORY_BAR = 1.3, 1.15
PLAIN, AUTO, WIDE = "plain safetensors read", 'dtype="auto"', "dtype=float32"

# Arguments: what to do, the folder. Prints seconds, peak and final growth of resident memory.
CHILD = """
import pathlib, sys, time, torch
from clipflow.models.unilip import UniLIPModel
from safetensors.torch import load_file
from clipflow.pipelines.loading import load_model
from clipflow.pipelines.model_folders import find_model
def resident():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    return [int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")]
def load(what, folder):
    if what == "plain":
        files = sorted(folder.glob("*.safetensors"))
        return [{name: t.clone() for name, t in load_file(file).items()} for file in files]
    return load_model(folder, dtype=None if what == "auto" else getattr(torch, what))
load("float32", find_model("scenes"))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = resident()[1]
start = time.perf_counter()
kept = load(sys.argv[1], pathlib.Path(sys.argv[2]))
seconds = time.perf_counter() - start
peak, now = resident()
print("result", seconds, peak - before, now - before)
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loading", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of the published form; default: a random one")
    parser.add_argument("--rounds", type=int, default=4, help="of every load, there and back")
    parser.add_argument("--json", type=Path, help="result file; default: a dated one in results/")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or write_random(Path(scratch) / "model")
        result = measure(folder, rounds=args.rounds)
    for row in result["rows"]:
        print(row_text(row))
    print(write_result("loading", result, args.json))
    return 0 if all(row["met"] for row in result["rows"]) else 1


def measure(folder: Path, *, rounds: int) -> dict[str, object]:
    """Medians of seconds, paired ratios to the plain read, and the largest peaks, with bars."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    order = {PLAIN: "plain", AUTO: "auto", WIDE: "float32"}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in order}
    for name in order:
        run(order[name], folder)  # fills the system's cache
    for _ in range(rounds):
        for name in (*order, *reversed(order)):
            runs[name].append(run(order[name], folder))
    ratios = {
        name: statistics.median(
            own["seconds"] / plain["seconds"]
            for own, plain in zip(runs[name], runs[PLAIN], strict=True)
        )
        for name in (AUTO, WIDE)
    }
    peaks = {name: max(r["peak"] for r in runs[name]) for name in order}
    wide = max(r["final"] for r in runs[WIDE])
    seconds = {name: statistics.median(r["seconds"] for r in runs[name]) for name in order}
    return {
        "folder_bytes": stored,
        "seconds": seconds,
        "peak_bytes": peaks,
        "runs": runs,
        "rows": [
            row(f"time, {AUTO}, of a plain read", ratios[AUTO], TIME_BAR),
            row(f"peak memory, {AUTO}, of the files", peaks[AUTO] / stored, MEMORY_BAR),
            row(f"peak memory, {WIDE}, of the model", peaks[WIDE] / wide, MEMORY_BAR),
        ],
        "time_ratio_float32": ratios[WIDE],
    }


def run(what: str, folder: Path) -> dict[str, float]:
    """One load in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", CHILD, what, str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"loading: {what} failed: {done.stderr.strip().splitlines()[-1]}")
    numbers = done.stdout.rsplit("result", 1)[1].split()
    return dict(zip(("seconds", "peak", "final"), map(float, numbers), strict=True))


def write_random(folder: Path) -> Path:
    """A random bfloat16 folder of about 2 GB with the widths of UniLIP-1B."""
    from clipflow.models.folders.checkpoint import write_shards
    from clipflow.testing.published_config import published_config
    from clipflow.testing.random_weights import RandomWeights
    from clipflow.testing.unilip_folder import plan_tensors, published_name

    full = unilip_1b_config()
    config = dataclasses.replace(
        full,
        vision=dataclasses.replace(full.vision, num_hidden_layers=12),
        text=dataclasses.replace(full.text, num_hidden_layers=12),
        dit=dataclasses.replace(full.dit, num_layers=16),
        decoder=dataclasses.replace(full.decoder, layers_per_block=(1, 1, 2, 1, 1, 2)),
        connect_layer=4,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published_config(config)))
    tensors = plan_tensors(config, torch.bfloat16)
    owns = {published_name(own): own for own in tensors}
    meta = {
        name: torch.empty(tensors[own][0], dtype=torch.bfloat16, device="meta")
        for name, own in owns.items()
    }
    weights = RandomWeights(0)
    write_shards(folder, meta, lambda name: weights.tensor(owns[name], *tensors[owns[name]]), "5GB")
    return folder


def row(name: str, value: float, bar: float) -> dict[str, object]:
    return {"name": name, "value": value, "bar": bar, "met": value <= bar}


def row_text(row: dict[str, object]) -> str:
    verdict = "met" if row["met"] else "MISSED"
    return f"{row['name']:<44}{row['value']:8.3f} at most {row['bar']}: {verdict}"


if __name__ == "__main__":
    sys.exit(main())
