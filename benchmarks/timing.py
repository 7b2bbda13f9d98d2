"""Clocks: contenders timed in turn, in A-B-B-A rounds, so that drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
MAX_CALLS = 100_000


@dataclass
class Times:
    """Seconds a call, one number a round: wall clock, and processor time of all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)


def interleaved(
    contenders: Mapping[str, Call],
    *,
    rounds: int,
    block_seconds: float,
    device: torch.device,
    calls_in_block: int | None = None,
    one_way: bool = False,
) -> dict[str, Times]:
    """Time every contender in each round, first to last and then last to first.

    Args:
        contenders: calls without arguments, by name. All are warmed up before any is timed.
        rounds: at least 5 for an interval that means something.
        block_seconds: how long one contender runs at a time; a round has two blocks of each.
        device: synchronized around every block.
        calls_in_block: instead of `block_seconds`, for calls of seconds that are warm already.
        one_way: a round is one block of each, first to last in one round and last to first in the
            next: A-B-B-A over two rounds, for calls of many seconds.
    """
    calls = {
        name: calls_in_block or _calls_for(call, block_seconds, device)
        for name, call in contenders.items()
    }
    times = {name: Times() for name in contenders}
    order = list(contenders)
    for number in range(rounds):
        back = list(reversed(order))
        visits = (back if number % 2 else order) if one_way else [*order, *back]
        blocks: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
        for name in visits:
            blocks[name].append(_block(contenders[name], calls[name], device))
        for name, pair in blocks.items():
            times[name].wall.append(statistics.mean(wall for wall, _ in pair))
            times[name].cpu.append(statistics.mean(cpu for _, cpu in pair))
    return times


def _calls_for(call: Call, seconds: float, device: torch.device) -> int:
    _block(call, 3, device)  # a first call may compile, or fill caches, for seconds
    calls = 1
    while True:
        wall = _block(call, calls, device)[0] * calls
        if wall >= seconds / 4 or calls >= MAX_CALLS:
            return max(1, min(MAX_CALLS, round(calls * seconds / max(wall, 1e-9))))
        calls *= 4


def _block(call: Call, calls: int, device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds a call, over `calls` calls."""
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    _synchronize(device)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
