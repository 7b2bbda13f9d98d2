"""Notices when the weights of a model are no longer what something was computed from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class WeightsWatch:
    """Names the state of some parameters: a new object whenever they have changed.

    A change is any new or resized parameter, `load_state_dict`, an optimizer's step, `to`; all that
    PyTorch counts as written. Writes behind its back (`parameter.data.copy_(...)`) are not seen.

    Args:
        parameters: lists the parameters to watch.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self._parameters = parameters
        self._lock = threading.Lock()
        self._state = object()
        self._storages: list[tuple[StorageWeakRef, int]] = []

    def state(self) -> object:
        """Stands for the weights as they are now; equal states are the same object."""
        with self._lock:
            now = [(p.untyped_storage(), version_of(p)) for p in self._parameters()]
            # While a weak reference is held, no other storage gets its address.
            before = [(ref.cdata, version) for ref, version in self._storages]
            if [(storage._cdata, version) for storage, version in now] != before:
                self._storages = [(StorageWeakRef(storage), version) for storage, version in now]
                self._state = object()
            return self._state

    def accept(self) -> None:
        """Take the weights as they are now for unchanged, after they were moved in memory."""
        with self._lock:
            now = [(p.untyped_storage(), version_of(p)) for p in self._parameters()]
            self._storages = [(StorageWeakRef(storage), version) for storage, version in now]


def version_of(tensor: Tensor) -> int:
    """How often PyTorch saw `tensor` written; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version
