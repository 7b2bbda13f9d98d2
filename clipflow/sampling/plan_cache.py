"""The plans of one model, kept between runs: least recently used ones go first."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from clipflow.sampling.memory import require_bytes
from clipflow.sampling.plan import Denoiser, PlanSpec, SamplingPlan
from clipflow.sampling.weights import WeightsWatch

MAX_BYTES = 4 * 2**30


class Plannable(Protocol):
    """A model that plans can be made for."""

    def parameters(self) -> Iterable[Tensor]:
        """What the constants of its plans are computed from."""

    def denoiser(self, spec: PlanSpec) -> Denoiser:
        """The model, prepared for `spec`."""

    def plan_bytes(self, spec: PlanSpec) -> int:
        """What `denoiser` will allocate."""


class PlanCache:
    """Plans by spec, within a budget of bytes, for any number of threads.

    A plan that is running belongs to its thread alone: a second thread with the same spec gets a
    second plan. Plans in use count for the budget but are never dropped; all idle plans are dropped
    when the model's weights change.

    Args:
        model: what is sampled.
        max_bytes: the budget, of all devices together.
    """

    def __init__(self, model: Plannable, max_bytes: int = MAX_BYTES) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self._watch = WeightsWatch(model.parameters)
        self._state = self._watch.state()
        self._lock = threading.RLock()
        self._idle: list[SamplingPlan] = []  # the one used last is at the end
        self._busy: list[SamplingPlan] = []

    @contextmanager
    def lease(self, spec: PlanSpec) -> Iterator[SamplingPlan]:
        """A plan for `spec` that nobody else uses until the `with` block ends.

        A block that raises, by Ctrl-C too, gives the plan's memory back.

        Raises:
            NotEnoughMemory: a new plan does not fit into the device's free memory.
            SamplingError: the model cannot be planned.
        """
        plan = self._take(spec)
        try:
            yield plan
        except BaseException:
            with self._lock:
                self._busy.remove(plan)
            raise
        with self._lock:
            self._busy.remove(plan)
            if self._state is self._watch.state():
                self._idle.append(plan)
                self._shrink()

    @property
    def nbytes(self) -> int:
        """Bytes that all plans hold."""
        with self._lock:
            return sum(plan.nbytes for plan in [*self._idle, *self._busy])

    def weights(self) -> object:
        """Stands for the model's weights as they are now, as `WeightsWatch.state` does."""
        with self._lock:
            return self._watch.state()

    def plans(self) -> list[SamplingPlan]:
        """The idle plans, the one used last at the end."""
        with self._lock:
            return list(self._idle)

    def clear(self) -> None:
        """Drop all idle plans."""
        with self._lock:
            self._idle.clear()

    def _take(self, spec: PlanSpec) -> SamplingPlan:
        with self._lock:
            state = self._watch.state()
            if state is not self._state:
                self._idle.clear()
                self._state = state
            for plan in reversed(self._idle):
                if plan.spec == spec:
                    self._idle.remove(plan)
                    break
            else:
                plan = self._make(spec)
            self._busy.append(plan)
            return plan

    def _make(self, spec: PlanSpec) -> SamplingPlan:
        needed = self.model.plan_bytes(spec)
        while self._idle and self.nbytes + needed > self.max_bytes:
            self._idle.pop(0)
        require_bytes(needed, spec.device, f"sampling {spec.samples} pictures at once")
        plan = SamplingPlan(spec, self.model.denoiser(spec))
        self._watch.accept()  # packing moves weights without changing them
        return plan

    def _shrink(self) -> None:
        while self._idle and self.nbytes > self.max_bytes:
            self._idle.pop(0)
