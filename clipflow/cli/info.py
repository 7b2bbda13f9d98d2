"""`clipflow info`: what a model is, without loading its weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from clipflow.cli.arguments import add_command

if TYPE_CHECKING:
    from clipflow.pipelines.loading import FolderSummary

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Where a picture is drawn -> what that is called here.
PLACES = {"cpu": "CPU", "cuda": "GPU", "cuda_offload": "GPU, offloaded"}


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "info",
        "show a model's architecture, parameters and memory",
        "clipflow info scenes",
    )
    parser.add_argument("model", metavar="MODEL", help="scenes, scenes-blip3o, or a model folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.pipelines.model_folders import find_model

    folder = find_model(args.model)
    # Slow; the name is right by now.
    from clipflow.pipelines.loading import check_model, summarize_folder

    check_model(folder)
    facts = collect(folder, summarize_folder(folder))
    print(json.dumps(facts, indent=2) if args.json else format_facts(facts))
    return 0


def collect(folder: Path, summary: FolderSummary) -> dict[str, object]:
    """Architecture, parameters and stored dtypes by part, bytes, and memory for one picture."""
    counts = summary.counts
    wide = sum(counts[part] for part in summary.family.wide)
    rest = sum(counts.values()) - wide
    return {
        "folder": str(folder),
        "family": summary.family.name,
        "architecture": summary.family.describe(summary.config),
        "parameters": counts,
        "dtypes": {
            part: sorted(str(dtype).removeprefix("torch.") for dtype in found)
            for part, found in summary.dtypes.items()
        },
        "skipped": summary.skipped,
        "float32_parts": list(summary.family.wide),
        "total": sum(counts.values()),
        "weight_bytes": {name: rest * size + wide * 4 for name, size in BYTES.items()},
        "file_bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        "memory": {tier: _memory(folder, tier) for tier in ("faithful", "fast")},
    }


def format_facts(facts: dict) -> str:
    lines = [f"model   {facts['folder']}", f"family  {facts['family']}", "", "architecture"]
    lines += [f"  {part:<16}{text}" for part, text in facts["architecture"].items()]
    wide = f" ({', '.join(facts['float32_parts'])} float32)" if facts["float32_parts"] else ""
    lines += ["", "parameters"]
    for part, count in facts["parameters"].items():
        stored = ", ".join(facts["dtypes"].get(part, ()))
        lines.append(f"  {part:<16}{count:>15,}  {stored}".rstrip())
    lines += [f"  {'total':<16}{facts['total']:>15,}", "", f"memory for weights{wide}"]
    lines += [
        f"  {name:<16}{size / 2**20:>11,.1f} MiB" for name, size in facts["weight_bytes"].items()
    ]
    lines += [f"  {'files':<16}{facts['file_bytes'] / 2**20:>11,.1f} MiB"]
    if facts["skipped"]:
        parts = [f"{part} ({count} tensors)" for part, count in facts["skipped"].items()]
        lines.append("  skipped: " + ", ".join(parts))
    lines += ["", "memory for one picture" + "".join(f"{shown:>18}" for shown in PLACES.values())]
    for tier, dtypes in facts["memory"].items():
        for name, sizes in dtypes.items():
            numbers = "".join(f"{sizes[place] / 2**20:>14,.1f} MiB" for place in PLACES)
            lines.append(f"  {f'{tier}, {name}':<20}{numbers}")
    return "\n".join(lines)


def _memory(folder: Path, tier: str) -> dict[str, dict[str, int]]:
    """Bytes at most, by dtype and place."""
    import torch

    from clipflow.pipelines.memory_estimate import folder_estimate

    memory = {}
    for name in BYTES:
        cpu, cuda = (
            folder_estimate(folder, tier=tier, dtype=getattr(torch, name), device=device)
            for device in ("cpu", "cuda")
        )
        memory[name] = dict(zip(PLACES, (cpu.peak, cuda.peak, cuda.peak_with_offload), strict=True))
    return memory
