"""Parts of a model that wait on the CPU and are on the device only while they run.

The diffusion transformer stays on the device, and so do the learned queries: they say where a
pipeline is. Whatever runs the other parts does it in `with offload.running(...)`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from clipflow.errors import InputError
from clipflow.sampling.memory import require_bytes
from clipflow.sampling.weights import version_of

T = TypeVar("T")

CPU = torch.device("cpu")
LANGUAGE, DECODER = "language", "decoder"


class Offload:
    """Brings the parts of a model to a device and back, for any number of threads.

    A part has its memory on the CPU all the time: when it has run, what was on the device is
    dropped, and nothing is copied back. Threads that run a part at the same time share it.

    Args:
        model: of any family.
        groups: LANGUAGE and DECODER -> the model's children that belong there.

    Attributes:
        device: where parts run; None while offloading is off, which it is at first.
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, Sequence[str]]) -> None:
        self._model = model
        self.groups = groups
        self._lock = threading.RLock()
        self._users = dict.fromkeys(groups, 0)
        self._away: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
        self.device: torch.device | None = None

    def enable(self, device: torch.device) -> None:
        """Put all parts to rest on the CPU, and run them on `device` from now on.

        Raises:
            NotEnoughMemory: the CPU has no room for them.
        """
        with self._lock:
            self.check_idle()
            tensors = [tensor for group in self.groups for tensor in self._tensors(group)]
            new = sum(tensor.nbytes for tensor in tensors if tensor.device != CPU)
            require_bytes(new, CPU, "offloading")
            for tensor in tensors:
                tensor.data = moved(tensor, CPU)
            self.device = device

    def disable(self) -> None:
        """Bring no parts any more; they stay where they are."""
        with self._lock:
            self.check_idle()
            self.device = None

    def check_idle(self) -> None:
        """Raise InputError while a part runs, an answer that is being streamed for one."""
        if self._away:
            raise InputError(
                f"a pipeline must not be moved while its {' and '.join(self._away)} part runs"
            )

    @contextmanager
    def running(self, group: str) -> Iterator[None]:
        """The parts of `group`, LANGUAGE or DECODER, are on the device in the `with` block.

        Raises:
            NotEnoughMemory: the device has no room for them.
        """
        with self._lock:
            device = self.device
            if device is not None:
                if not self._users[group]:
                    self._bring(group, device)
                self._users[group] += 1
        try:
            yield
        finally:
            if device is not None:
                with self._lock:
                    self._users[group] -= 1
                    if not self._users[group]:
                        self._drop(group)

    def while_running(self, group: str, items: Iterable[T]) -> Iterator[T]:
        """`items`, each of which needs the parts of `group`."""
        with self.running(group):
            yield from items

    def at_rest(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`tensors` as they are when nothing runs: same memory and version, whatever runs now."""
        if self.device is None:
            return list(tensors)
        with self._lock:
            homes = {id(tensor): home for away in self._away.values() for tensor, home, _ in away}
            return [homes.get(id(tensor), tensor.detach()) for tensor in tensors]

    def _bring(self, group: str, device: torch.device) -> None:
        tensors = self._tensors(group)
        new = sum(tensor.nbytes for tensor in tensors if tensor.device != device)
        require_bytes(new, device, f"the {group} part of the model")
        away = self._away[group] = []
        try:
            for tensor in tensors:
                # `detach` shares memory and count of versions; setting `data` leaves the count.
                home = tensor.detach()
                tensor.data = moved(tensor, device)
                away.append((tensor, home, version_of(tensor)))
        except BaseException:
            self._drop(group)
            raise

    def _drop(self, group: str) -> None:
        for tensor, home, version in self._away.pop(group):
            if version_of(tensor) != version:  # someone wrote to it
                home.copy_(tensor.detach())
            tensor.data = home

    def _tensors(self, group: str) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for name in self.groups[group]:
            part = getattr(self._model, name)
            if part is not None:
                found |= {id(t): t for t in (*part.parameters(), *part.buffers())}
        return list(found.values())


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The values of `tensor` on `device`."""
    return tensor.detach().to(device)
