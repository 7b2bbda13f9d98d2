"""How time and memory of sampling grow with batch, tokens and steps, and the exponents of that."""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.growth_plot import growth_plot
from benchmarks.machine import RESULTS, write_result
from benchmarks.sampling_contenders import Planned
from benchmarks.sampling_models import GUIDANCE, Cell, Models, Workload, plan_spec
from clipflow.sampling import SamplingPlan

Result = dict[str, object]
STATUS = Path("/proc/self/status")
BASE = Cell(model="unilip-1b", blocks=1, batch=1, side=16)
BASE_STEPS = 1
POINTS = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "tokens": (64, 144, 256, 576, 1024, 2304, 4096),
    "steps": (1, 2, 5, 10, 20, 50),
}
MEASURES = ("seconds", "plan_bytes", "peak_bytes")
REPEATS = 3


def measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """Measure all curves, print their exponents, and write result and plot."""
    base, points = BASE, POINTS
    if args.tiny:
        base, points = replace(BASE, model="tiny", side=4), {"batch": (1, 2), "steps": (1, 2)}
    models = Models(base.config, device, dtype)
    curves = []
    for name, sizes in points.items():
        found = [point(models, *sized(base, name, size)) for size in sizes]
        exponents = {
            key: exponent(sizes, values)
            for key in MEASURES
            if all(values := [p[key] for p in found])
        }
        curves.append({"name": name, "sizes": sizes, "points": found, "exponents": exponents})
        texts = [f"{key} ^{value:.2f}" for key, value in exponents.items()]
        print(f"growth with {name} ({sizes[0]} to {sizes[-1]}): {', '.join(texts)}", flush=True)
    body = {
        "settings": {"device": args.device, "dtype": args.dtype},
        "base": base.name,
        "base_steps": BASE_STEPS,
        "curves": curves,
    }
    path = write_result("growth", body, args.json)
    plot = (path.parent if args.json else RESULTS) / "growth.svg"
    plot.write_text(growth_plot(curves))
    print(path, plot, sep="\n")
    return 0


def sized(base: Cell, name: str, size: int) -> tuple[Cell, int]:
    """The cell and the number of steps where `name` is `size` and all else is as in `base`."""
    if name == "steps":
        return base, size
    return replace(base, **({"batch": size} if name == "batch" else {"side": math.isqrt(size)})), (
        BASE_STEPS
    )


def point(models: Models, cell: Cell, steps: int) -> Result:
    """Seconds of a run of a ready plan, bytes of the plan, and what the process took at most.

    `peak_bytes` is what resident memory rose by from before the plan was made; 0 where the system
    does not tell.
    """
    device, dtype = models.stock.device, models.stock.dtype
    work = Workload(cell, device, dtype)
    before = reset_peak(device)
    spec = plan_spec(cell, steps, "faithful", device, dtype)
    ours = Planned(SamplingPlan(spec, models.ours.denoiser(spec)), work)
    run = partial(ours.plan.run, work.noise, work.null, work.cond, guidance=GUIDANCE)
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if seconds[0] > 2:
            break
    peak = peak_bytes(device)
    risen = 0 if before is None or peak is None else max(0, peak - before)
    return {"seconds": min(seconds), "plan_bytes": ours.plan.nbytes, "peak_bytes": risen}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of values ~ sizes ** p: the slope of the least-squares line through the logarithms."""
    xs, ys = ([math.log(v) for v in column] for column in (sizes, values))
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True))
    return slope / sum((x - x0) ** 2 for x in xs)


def reset_peak(device: torch.device) -> int | None:
    """Give free memory back, start the peak anew, and return the bytes in use; None if unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: resets the peak of resident memory
        return _status("VmRSS")
    except OSError:
        return None


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes in use since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if STATUS.exists() else None


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
