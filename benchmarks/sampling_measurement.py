"""One size of `benchmarks/sampling.py`: results compared first, then contenders timed in turn."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.ratios import paired_ratio
from benchmarks.sampling_contenders import (
    ACCELERATED,
    EAGER,
    FAITHFUL,
    FAST,
    INDUCTOR,
    PEERS,
    PIPELINE,
    Cast,
    Contender,
)
from benchmarks.sampling_models import Cell, Workload, relative_error, step_flops
from benchmarks.timing import Times, interleaved

Result = dict[str, object]
FAST_BAR, RUN_BAR = 3e-2, 1e-3  # relative L2 of a velocity; of a faithful run's latents


class Measurement:
    """One cell: who is right, and how fast everybody is.

    Attributes:
        turns, one_way: rounds of `interleaved`, and whether they go one way.
        rows: what was timed.
        wrong: lines about who was not, since the result was wrong.
    """

    def __init__(self, cell: Cell, cast: Cast, device: torch.device, dtype: torch.dtype) -> None:
        self.cell, self.cast, self.device = cell, cast, device
        self.work = Workload(cell, device, dtype)
        self.turns, self.one_way = 5, False
        self.rows: list[Result] = []
        self.wrong: list[str] = []

    def step(self, what: str) -> None:
        """Compare velocities in the middle of a run, then time single steps."""
        contenders = self.cast.of(self.cell, self.work, 20, runs=False)
        if self.one_way:
            contenders.pop(ACCELERATED, None)
        errors = self._check_velocities(contenders)
        calls = {name: contenders[name].step for name in errors}
        self._time(what, calls, errors, steps=1)

    def run(self, steps: int) -> None:
        """Compare the latents of whole runs, then time them."""
        contenders = self.cast.of(self.cell, self.work, steps, runs=True)
        wanted = contenders[EAGER].run()
        errors = {name: relative_error(one.run(), wanted) for name, one in contenders.items()}
        # A fast or half-precision run may end elsewhere: then the bar is that of single steps.
        if self.work.hidden.dtype == torch.float32:
            far = {n: e for n, e in errors.items() if n != FAST and not e <= RUN_BAR}
            self.wrong += [
                f"run, {self.cell.name}, {name}: {error:.2e} from {EAGER}"
                for name, error in far.items()
            ]
        else:
            single = {name: one for name, one in contenders.items() if name != PIPELINE}
            far = single.keys() - self._check_velocities(single).keys()
        errors = {name: error for name, error in errors.items() if name not in far}
        calls = {name: contenders[name].run for name in errors}
        self._time(f"run of {steps} steps", calls, errors, steps=steps)

    def _check_velocities(self, contenders: dict[str, Contender]) -> dict[str, float]:
        """Relative error of everybody who is right, against float64 on the same tensors."""
        work = self.work
        index = contenders[EAGER].loop.steps // 2
        rows = torch.cat([work.noise, work.noise]).to(work.hidden.dtype)
        time = int(contenders[EAGER].loop.scheduler.timesteps[index])
        truth = self.cast.models.truth(rows, time, work.hidden, work.mask)
        errors = {
            name: relative_error(one.velocity(rows, index), truth)
            for name, one in contenders.items()
        }
        # Peers are who they are; only one that computes something else is left out.
        bars = {name: 2 * errors[EAGER] for name in (FAITHFUL, ACCELERATED)}
        bars |= {FAST: max(FAST_BAR, 2 * errors[EAGER]), INDUCTOR: 100 * errors[EAGER]}
        for name, bar in bars.items():
            if name in errors and not errors[name] <= bar:
                self.wrong.append(f"{self.cell.name}, {name}: {errors[name]:.2e} > {bar:.2e}")
                del errors[name]
        return errors

    def _time(
        self,
        what: str,
        calls: dict[str, Callable[[], object]],
        errors: dict[str, float],
        *,
        steps: int,
    ) -> None:
        times = interleaved(
            calls,
            rounds=self.turns,
            block_seconds=0.0,
            device=self.device,
            calls_in_block=1,
            one_way=self.one_way,
        )
        cell = self.cell
        for name in times:
            head = {"what": what, "model": cell.model, "blocks": cell.blocks, "batch": cell.batch}
            row = {
                **head, "tokens": cell.tokens, "contender": name, "peer": name in PEERS,
                "error": errors[name], **timings(name, times, steps * step_flops(cell)),
            }  # fmt: skip
            self.rows.append(row)
            print(row_text(row), flush=True)


def timings(name: str, times: dict[str, Times], flops: float) -> Result:
    """Seconds, useful GFLOP/s, and paired ratios against every peer but itself."""
    ours, others = times[name], [p for p in PEERS if p in times and p != name]
    return {
        "wall_s": ours.median,
        "cpu_s": ours.median_cpu,
        "gflop_per_s": flops / ours.median / 1e9,
        "times_faster_than": {p: vars(paired_ratio(times[p].wall, ours.wall)) for p in others},
        "times_less_cpu_than": {p: vars(paired_ratio(times[p].cpu, ours.cpu)) for p in others},
    }


def row_text(row: Result) -> str:
    text = f"{row['what']:<18}{row['model']:<10} {row['blocks']:>2} blocks batch {row['batch']} "
    text += f"{row['contender']:<22}{row['wall_s']:>8.3f} s {row['cpu_s']:>8.3f} cpu s"
    text += f"{row['gflop_per_s']:>7.0f} GFLOP/s error {row['error']:.1e}"
    for peer, r in row["times_faster_than"].items():
        text += f"  {r['value']:.2f}x {peer} [{r['low']:.2f}, {r['high']:.2f}]"
    return text
