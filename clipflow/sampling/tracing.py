"""Which ops a piece of code calls: names and counts, without those that only look at memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode

# Ops that make no kernel run: memory from the allocator, and shapes.
_SILENT = {
    "empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh",
    "promote_types", "_unsafe_view",
}  # fmt: skip


def kernels_of(run: Callable[[], object]) -> dict[str, int]:
    """Call `run` and count the ops in it that compute or move data, in order of appearance."""
    with _Recorder() as recorder:
        run()
    return dict(recorder.counts)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in _SILENT:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
