"""The training loop: one model, one stage, one recipe, resumable at any moment.

`fit` is the same for every stage. A stage says what a batch is and what the loss is.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from clipflow.training import checkpoint, optim, schedule
from clipflow.training.ema import EMA
from clipflow.training.recipe import Recipe
from clipflow.training.report import Report

_log = logging.getLogger(__name__)


class Stage(Protocol):
    """The data and the loss of one kind of training.

    Attributes:
        images_per_batch: for the images/s that a run reports.
    """

    images_per_batch: int

    def setup(self, model: nn.Module, recipe: Recipe, workdir: Path, device: torch.device) -> None:
        """Prepare the run; called once in each process, before a checkpoint is restored.

        `model` is the one the run starts from, also when it resumes: a teacher copied here is
        the same in every piece of the run. It is on `device`, in train mode (switch frozen parts
        to eval mode here), with `requires_grad` set as the recipe says. `workdir` is the run's
        own folder for caches. Parameters added to `model` here are kept, but do not train.
        """

    def batch(self, step: int) -> Any:
        """The batch of one step (0-based), a function of the recipe's seed and `step` alone.

        Called in a background thread while the step before is computed: it must not draw from
        global random generators.
        """

    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The scalar loss of a batch, and what else to log. Global generators may be used here."""


def fit(
    model: nn.Module, stage: Stage, recipe: Recipe, out: Path, *, progress: bool = True
) -> None:
    """Train `model` in place; it ends in eval mode with the averaged (EMA) weights.

    Checkpoints go to `out/checkpoints`, a line every `log_every` steps to `out/log.jsonl`. Called
    again with the same arguments after any interruption, it continues where the newest whole
    checkpoint stands; without a `minutes` cap the result is bitwise that of an unbroken run.
    Ctrl-C or SIGTERM saves a checkpoint first.

    Args:
        model: trained on the recipe's `device` option; default: CUDA where there is one.
        stage: see `Stage`.
        recipe: see `Recipe`.
        out: folder of this run.
        progress: show a bar on stderr.

    Raises:
        ValueError: a prefix of the recipe names no parameter; or the loss or the gradient is not
            finite (found at the next log line, always before a checkpoint).
        OSError: a checkpoint or log line cannot be written (disk full); earlier ones stay.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after saving.
    """
    run = _Run(model, stage, recipe, out)
    images = stage.images_per_batch
    with (
        Report(
            out,
            recipe.name,
            step=run.step,
            steps=recipe.steps,
            log_every=recipe.log_every,
            bar=progress,
        ) as report,
        _Batches(stage, recipe.options.get("prefetch", run.device.type != "cpu")) as batches,
        _StopSignal() as stop,
    ):
        done = run.progress
        while done < 1.0 and not stop.received:
            lr, loss, metrics = run.train_step(batches.get(run.step))
            report.add(loss, metrics, images)
            done = run.progress
            saving = run.is_checkpoint_due or done >= 1.0 or stop.received
            # The last line before a checkpoint also proves that the loss is still finite.
            report.flush(run.step, lr=lr, elapsed=run.elapsed, done=done, force=saving)
            if saving:
                run.save()
    if stop.received:
        raise KeyboardInterrupt(f"stopped at step {run.step}; the same command continues")
    run.ema.copy_to_parameters()
    model.eval()


def training_device(recipe: Recipe) -> torch.device:
    """The recipe's `device` option, or CUDA where there is one, or the CPU."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(recipe.options.get("device", default))


class _Run:
    """The state of a run: everything a checkpoint holds, and the step that advances it."""

    def __init__(self, model: nn.Module, stage: Stage, recipe: Recipe, out: Path) -> None:
        self.model, self.stage, self.recipe = model, stage, recipe
        self.folder = out / "checkpoints"
        self.device = training_device(recipe)
        workdir = out / "work"
        workdir.mkdir(parents=True, exist_ok=True)
        if "threads" in recipe.options:
            torch.set_num_threads(recipe.options["threads"])
        checkpoint.seed_generators(recipe.seed)
        model.to(self.device).train()
        self.trained = optim.select_trainable(model, recipe.trainable)
        stage.setup(model, recipe, workdir, self.device)
        self.optimizers = optim.build_optimizers(model, self.trained, recipe)
        self.ema = EMA(self.trained, recipe.ema)
        self.step = 0
        self.elapsed_before = 0.0
        self._restore()
        self.started = time.monotonic()
        self.saved_at = self.started

    @property
    def elapsed(self) -> float:
        """Seconds trained so far, over all pieces of the run."""
        return self.elapsed_before + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """How much of the run is over, in [0, 1]."""
        return schedule.progress(self.step, self.recipe.steps, self.elapsed, self.recipe.minutes)

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether the recipe's interval has passed since the last checkpoint."""
        if self.recipe.checkpoint_steps is not None:
            return self.step % self.recipe.checkpoint_steps == 0
        return time.monotonic() - self.saved_at >= 60 * self.recipe.checkpoint_minutes

    def train_step(self, batch: Any) -> tuple[float, Tensor, dict[str, float | Tensor]]:
        """One optimizer step: (learning rate, loss, metrics)."""
        recipe = self.recipe
        lr = recipe.lr * schedule.lr_ratio(
            self.step,
            self.progress,
            warmup_steps=recipe.warmup_steps,
            min_lr_ratio=recipe.min_lr_ratio,
        )
        optim.set_lr(self.optimizers, lr)
        loss, metrics = self.stage.loss(batch, self.step)
        loss.backward()
        limit = recipe.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.trained.values(), limit, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        self.step += 1
        return lr, loss.detach(), {**metrics, "grad_norm": norm}

    def save(self) -> None:
        """Write a checkpoint of this very moment."""
        rng_tensors, rng_facts = checkpoint.rng_state(self.device)
        tensors = {
            "model": _unshared_state(self.model),
            "ema": self.ema.averages,
            "optimizer": optim.optimizer_state(self.optimizers, self.trained),
            "rng": rng_tensors,
        }
        snapshot = checkpoint.Snapshot(self.step, self.elapsed, tensors, {"rng": rng_facts})
        checkpoint.save(self.folder, snapshot)
        self.saved_at = time.monotonic()

    def _restore(self) -> None:
        """Continue from the newest whole checkpoint, if there is one.

        Raises:
            ValueError: the checkpoint is of another model or another choice of parameters.
        """
        snapshot = checkpoint.load(self.folder)
        if snapshot is None:
            return
        found, wanted = set(snapshot.tensors["model"]), set(_unshared_state(self.model))
        if found != wanted:
            raise ValueError(
                f"checkpoint: {self.folder} must hold the tensors of this model, got "
                f"{len(wanted - found)} missing and {len(found - wanted)} unknown"
            )
        try:
            self.model.load_state_dict(snapshot.tensors["model"], strict=False)
        except RuntimeError as error:  # a tensor of another shape
            raise ValueError(f"checkpoint: {self.folder} is of another model: {error}") from error
        self.ema.load(snapshot.tensors["ema"])
        optim.load_optimizer_state(self.optimizers, self.trained, snapshot.tensors["optimizer"])
        checkpoint.set_rng_state(snapshot.tensors["rng"], snapshot.facts["rng"], self.device)
        self.step, self.elapsed_before = snapshot.step, snapshot.elapsed
        _log.info("%s: resumed at step %d", self.recipe.name, self.step)


class _Batches:
    """Batches in order; with `prefetch` the next is built in a thread while this one is used.

    A second thread that runs torch operators on a CPU gets an OpenMP team of its own, and the two
    teams slow each other: 71 images/s against 110 on 2 cores. There, batches are built in turn.
    """

    def __init__(self, stage: Stage, prefetch: bool) -> None:
        self.stage = stage
        self.pool = ThreadPoolExecutor(1, "clipflow-batch") if prefetch else None
        self.ahead: tuple[int, Future] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int) -> Any:
        """The batch of `step`; starts on the one after it."""
        if self.pool is None:
            return self.stage.batch(step)
        if self.ahead is None or self.ahead[0] != step:
            self.ahead = (step, self.pool.submit(self.stage.batch, step))
        batch = self.ahead[1].result()
        self.ahead = (step + 1, self.pool.submit(self.stage.batch, step + 1))
        return batch


class _StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request; a second one acts as always."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.__exit__()


def _unshared_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each shared (tied) tensor once, under its first name."""
    seen: set[tuple] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        state[name] = tensor
    return state
