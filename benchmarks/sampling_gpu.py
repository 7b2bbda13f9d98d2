"""What only a GPU has: FLOP utilization, bandwidth, time lines, cold starts; and counts of plans.

`new_plans` runs anywhere: after every size was seen once, no further plan or graph may be made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.sampling_contenders import Planned
from benchmarks.sampling_models import GUIDANCE, Cell, Models, Workload, plan_spec, step_flops
from clipflow.models.dits.sana import SanaTransformer
from clipflow.sampling import PlanCache, SamplingPlan

Result = dict[str, object]

CELLS = tuple(
    Cell(model=model, blocks=blocks, batch=batch, side=side)
    for model, blocks in (("unilip-1b", 28), ("unilip-3b", 20))
    for batch in (1, 8)
    for side in (16, 32)
)
SIDES = (8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 32)
BATCHES = (1, 2, 4)
STEPS = 20


def extras(models: Models, cells: Sequence[Cell]) -> list[Result]:
    """Graph time, utilization and time line of both tiers on each cell, without peers."""
    device, dtype = models.stock.device, models.stock.dtype
    weight_bytes = sum(p.nbytes for p in models.ours.transformer_blocks.parameters())
    rows = []
    for cell in cells:
        work = Workload(cell, device, dtype)
        for tier in ("faithful", "fast"):
            torch.cuda.synchronize()
            start = time.perf_counter()
            spec = plan_spec(cell, STEPS, tier, device, dtype)
            ours = Planned(SamplingPlan(spec, models.ours.denoiser(spec)), work)
            ours.run()
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            seconds = graph_seconds(ours)
            rows.append({
                "model": cell.model, "batch": cell.batch, "tokens": cell.tokens, "tier": tier,
                "graph_ms_per_step": seconds / STEPS * 1e3,
                "tflop_per_s": STEPS * step_flops(cell) / seconds / 1e12,
                "weights_gb_per_s": STEPS * weight_bytes / seconds / 1e9,
                "kernels_per_step": sum(ours.plan.kernels().values()),
                "first_run_over_warm_s": first - seconds,
                "plan_bytes": ours.plan.nbytes,
                "time_line": time_line(ours),
            })  # fmt: skip
            print({key: value for key, value in rows[-1].items() if key != "time_line"})
    return rows


def graph_seconds(ours: Planned, runs: int = 5) -> float:
    """GPU seconds of one run, the least of several, with the L2 cache overwritten before each."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=ours.work.noise.device)
    found = []
    for _ in range(runs):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        ours.plan.run(ours.work.noise, ours.work.null, ours.work.cond, guidance=GUIDANCE)
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return min(found)


def time_line(ours: Planned) -> list[Result]:
    """GPU kernels of one step in the order they run, with the microseconds of each."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    ours.step()
    with torch.profiler.profile(activities=activities) as profile:
        ours.step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    return [{"kernel": e.name, "us": e.time_range.elapsed_us()} for e in kernels]


def new_plans(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Result:
    """Plans and CUDA graphs made for 12 sizes x 3 batches the first time, and the second time."""
    sides, batches = (SIDES[:2], BATCHES[:2]) if tiny else (SIDES, BATCHES)
    model = SanaTransformer(Cell(model="tiny", blocks=2, batch=1).config).eval().to(device, dtype)
    plans, made = PlanCache(model), []
    known: set[int] = set()
    with counted_graphs() as graphs:
        for _ in ("first", "again"):
            new, before = 0, len(graphs)
            for side in sides:
                for batch in batches:
                    cell = Cell(model="tiny", blocks=2, batch=batch, side=side)
                    work = Workload(cell, device, dtype)
                    with plans.lease(plan_spec(cell, 2, "faithful", device, dtype)) as plan:
                        plan.run(work.noise, work.null, work.cond, guidance=2.0)
                        new += id(plan) not in known
                        known.add(id(plan))
            made.append({"plans": new, "graphs": len(graphs) - before})
    result = {"sizes": len(sides), "batches": len(batches), "first": made[0], "again": made[1]}
    print(f"{len(sides)} sizes x {len(batches)} batches: {made[0]} made at first, then {made[1]}")
    return result


@contextmanager
def counted_graphs() -> Iterator[list[None]]:
    """A list that grows by one for each CUDA graph captured in the `with` block."""
    captured: list[None] = []
    original = torch.cuda.graph

    def counting(*args, **options):
        captured.append(None)
        return original(*args, **options)

    torch.cuda.graph = counting
    try:
        yield captured
    finally:
        torch.cuda.graph = original
