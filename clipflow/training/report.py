"""What a run tells: one JSON line every few steps, and a progress bar."""

from __future__ import annotations

import errno
import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType

from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

LOG = "log.jsonl"


class Report:
    """Collects losses and metrics; writes their means to `log.jsonl` and to the progress bar.

    Args:
        out: folder of the run.
        name: what the bar calls the run.
        step: step the run resumes from. Later log lines are of lost steps, and are dropped.
        steps: steps in the whole run.
        log_every: steps between two lines.
        bar: whether to show the bar (stderr).
    """

    def __init__(
        self, out: Path, name: str, *, step: int, steps: int, log_every: int, bar: bool
    ) -> None:
        self.path = out / LOG
        self.name = name
        self.steps = steps
        self.log_every = log_every
        self.sums: dict[str, float | Tensor] = {}
        self.counts: dict[str, int] = {}
        self.count = 0
        self.images = 0
        self.since = time.monotonic()
        self.smoothed: float | None = None
        # A log file is no terminal: there the bar prints a line every half minute.
        self.patience = 0.5 if sys.stderr.isatty() else 30.0
        self.shown = -math.inf
        self.bar = tqdm(
            total=1.0,
            desc=name,
            disable=not bar,
            bar_format="{percentage:3.0f}%|{bar:24}| {desc}",
        )
        _drop_lines_after(self.path, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def add(self, loss: Tensor, metrics: dict[str, float | Tensor], images: int) -> None:
        """Count one step; on a GPU nothing waits for its result here."""
        for name, value in {"loss": loss, **metrics}.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.count += 1
        self.images += images

    def flush(self, step: int, *, lr: float, elapsed: float, done: float, force: bool) -> None:
        """Write a line and move the bar where `step` is due, or `force` is set.

        Raises:
            ValueError: a loss or gradient norm since the last line is not finite.
        """
        if not self.count or (step % self.log_every and not force):
            return
        # A metric of some steps only ("edit") is a mean over those.
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(means.get(name, 0.0)):
                raise ValueError(
                    f"training: {name} must be finite, got {means[name]} in steps "
                    f"{step - self.count + 1} to {step}; lower lr or clip, or look at the data"
                )
        now = time.monotonic()
        rate = self.images / max(now - self.since, 1e-9)
        line = {"step": step, "loss": means.pop("loss"), "lr": lr, "images_per_second": rate}
        _append(self.path, json.dumps({**line, "minutes": elapsed / 60, **means}) + "\n")
        self.smoothed = _smooth(self.smoothed, line["loss"])
        if force or now - self.shown >= self.patience:
            self._show(step, lr, rate, elapsed, done)
            self.shown = now
        self.sums, self.counts = {}, {}
        self.count, self.images, self.since = 0, 0, now

    def _show(self, step: int, lr: float, rate: float, elapsed: float, done: float) -> None:
        left = tqdm.format_interval(elapsed * (1 - done) / max(done, 1e-9))
        self.bar.n = done
        self.bar.set_description_str(
            f"{self.name}: step {step}/{self.steps}, loss {self.smoothed:.4f}, lr {lr:.2e}, "
            f"{rate:.0f} images/s, {left} left",
            refresh=False,
        )
        self.bar.refresh()


def _smooth(old: float | None, new: float) -> float:
    """An average over about the last five lines."""
    return new if old is None else 0.8 * old + 0.2 * new


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"cannot write {path}: {error.strerror}") from error


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the log true: a resumed run repeats the steps after its checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the line a killed run was writing
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(path)
