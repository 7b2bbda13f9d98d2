"""Time sampling with UniLIP's transformer against diffusers, and the embedded model end to end.

Run: python benchmarks/sampling.py [--quick] [--part step --part run ...] [--growth]

Models have true widths and random weights; on a CPU fewer blocks, with one point at full depth. On
each size velocities are compared with float64 first; a wrong contender is not timed and the run
fails. Contenders are then timed in turn, in one process; ratios are paired by round, with a
bootstrap interval.

Parts: step (one solver step with guidance), run (a whole run for new prompts), depth (the step at
full depth), tiers (errors of the fast tier), image (the embedded model), plans (how many are made).
--growth instead measures time and memory against batch, tokens and steps.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import sampling_gpu, sampling_growth, sampling_image, sampling_tiers
from benchmarks.machine import ceilings, facts, keep_freed_memory, write_result
from benchmarks.sampling_bars import gpu_bars, print_summaries, summaries_of
from benchmarks.sampling_contenders import Cast
from benchmarks.sampling_measurement import Measurement
from benchmarks.sampling_models import Cell, Models

Result = dict[str, object]
PARTS = ("step", "run", "depth", "tiers", "image", "plans")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured.

    Attributes:
        steps, runs, depth: sizes that the parts of these names measure.
        run_steps: solver steps of a whole run.
        tier_steps: steps that the fast tier's error is looked at over.
        inductor, pipeline: whether torch.compile and SanaPipeline take part.
        image: what the embedded model does.
        rounds: A-B-B-A rounds.
        turns: rounds of larger batches and of full depth, which go one way, each the other way.
    """

    steps: tuple[Cell, ...]
    runs: tuple[Cell, ...]
    depth: tuple[Cell, ...]
    run_steps: int
    tier_steps: int
    inductor: bool
    pipeline: bool
    image: sampling_image.ImageScale
    rounds: int = 5
    turns: int = 6


def cells(models: tuple[str, ...], blocks: int, batches: tuple[int, ...]) -> tuple[Cell, ...]:
    return tuple(Cell(model=m, blocks=blocks, batch=b) for m in models for b in batches)


FULL = Scale(
    # Of the wider one half as many blocks: a run is to take minutes.
    steps=cells(("unilip-1b",), 4, (1, 4)) + cells(("unilip-3b",), 2, (1, 4)),
    runs=cells(("unilip-1b",), 4, (1,)),
    depth=cells(("unilip-1b",), 28, (1,)),
    run_steps=4,
    tier_steps=20,
    inductor=True,
    pipeline=True,
    image=sampling_image.ImageScale(steps=20, batch=8, rounds=5),
)
QUICK = Scale(
    steps=cells(("unilip-1b",), 1, (1,)),
    runs=(),
    depth=(),
    run_steps=2,
    tier_steps=4,
    inductor=False,
    pipeline=False,
    image=sampling_image.ImageScale(steps=4, batch=2, rounds=2),
)
TINY_CELL = (Cell(model="tiny", blocks=2, batch=2, side=4),)
TINY = Scale(
    steps=TINY_CELL,
    runs=TINY_CELL,
    depth=(),
    run_steps=2,
    tier_steps=2,
    inductor=False,
    pipeline=True,
    image=sampling_image.ImageScale(steps=1, batch=2, rounds=1),
    rounds=2,
    turns=2,
)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    machine = facts()
    print(f"{machine['cpu']}, {machine['threads']} threads, GPU {machine['gpu']}")
    if args.growth:
        return sampling_growth.measure(args, device, dtype)
    keep_freed_memory()
    limits = ceilings(device, dtype, quick=args.quick)
    print("copy {copy_gb_per_s:.1f} GB/s, GEMM {gemm_gflop_per_s:.0f} GFLOP/s".format(**limits))

    body: Result = {"ceilings": limits, "rows": [], "wrong": [], "absent": {}}
    body |= {"tiers": [], "gpu": []}
    measure_models(args, device, dtype, body)
    if "image" in args.parts:
        body |= sampling_image.measure(args.scale.image, device, dtype)
        body["tiers"] += sampling_tiers.trained(args.scale.image.steps, device, dtype)
    if "plans" in args.parts:
        body["plans"] = sampling_gpu.new_plans(device, dtype, tiny=args.tiny)
    body["summaries"] = summaries_of(body["rows"])
    body["gpu_bars"] = gpu_bars(body["rows"], body["gpu"])
    print_summaries(body["summaries"])
    for line in body["wrong"]:
        print(f"WRONG, not timed: {line}", file=sys.stderr)
    body["settings"] = {
        "device": args.device, "dtype": args.dtype, "rounds": args.rounds or args.scale.rounds,
        "quick": args.quick, "parts": args.parts,
    }  # fmt: skip
    print(write_result("sampling", body, args.json))
    return 1 if body["wrong"] else 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on GPU")
    parser.add_argument("--rounds", type=int, help="A-B-B-A rounds; default 5")
    parser.add_argument(
        "--part", action="append", choices=PARTS, dest="parts", help="repeat it; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="one small size, no torch.compile")
    parser.add_argument("--growth", action="store_true", help="time and memory against the size")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests
    parser.add_argument("--json", type=Path, help="result file; default: a dated one in results/")
    args = parser.parse_args(argv)
    on_gpu = torch.device(args.device).type == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.parts = args.parts or list(PARTS)
    args.scale = TINY if args.tiny else QUICK if args.quick else FULL
    if on_gpu and args.scale is FULL:
        args.scale = Scale(
            steps=(), runs=sampling_gpu.CELLS, depth=(), run_steps=20, tier_steps=20,
            inductor=True, pipeline=True, image=FULL.image,
        )  # fmt: skip
    return args


def measure_models(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, body: Result
) -> None:
    """Steps and runs of all cells, model by model, into `body`."""
    scale, parts = args.scale, args.parts
    todo = [(part, cell) for part, found in (
        ("step", scale.steps), ("run", scale.runs), ("depth", scale.depth)
    ) if part in parts for cell in found]  # fmt: skip
    for kind in dict.fromkeys((cell.model, cell.blocks) for _, cell in todo):
        mine = [(part, cell) for part, cell in todo if (cell.model, cell.blocks) == kind]
        deep = all(part == "depth" for part, _ in mine)
        models = Models(mine[0][1].config, device, dtype)
        cast = Cast(models, inductor=scale.inductor and not deep, pipeline=scale.pipeline)
        for part, cell in mine:
            large = device.type == "cpu" and (deep or cell.batch > 1)
            measure = Measurement(cell, cast, device, dtype)
            measure.turns = args.rounds or (scale.turns if large else scale.rounds)
            measure.one_way = large
            if part == "run":
                measure.run(scale.run_steps)
            else:
                measure.step("step" if part == "step" else "step, full depth")
            body["rows"] += measure.rows
            body["wrong"] += measure.wrong
        body["absent"] |= cast.absent
        if "tiers" in parts:
            steps = scale.tier_steps if mine[0][1].config.hidden_size < 2000 and not deep else 5
            body["tiers"].append(sampling_tiers.random_weights(mine[0][1], models, steps))
        if device.type == "cuda":
            found = sampling_gpu.extras(models, [cell for _, cell in mine])
            for row in found:
                row["mfu"] = row["tflop_per_s"] * 1e3 / body["ceilings"]["gemm_gflop_per_s"]
            body["gpu"] += found


if __name__ == "__main__":
    sys.exit(main())
