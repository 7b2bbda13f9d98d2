"""Counts the bytes of tensors that live at once; on the meta device too, so of any size."""

import weakref
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts memory that was not there before, from when it is made until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in storages(result):
            key, count = storage._cdata, storage.nbytes()
            if key not in self.known and key not in given:
                self.known.add(key)
                self.now += count
                weakref.finalize(storage, self.forget, key, count)
        self.most = max(self.most, self.now)
        return result

    def forget(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count


class FusedAttention(TorchFunctionMode):
    """Attention that holds no scores: on the meta device PyTorch would."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return function(*args, **(kwargs or {}))


def storages(values: object) -> list:
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


@torch.no_grad()
def most_bytes(run: Callable[[], object]) -> int:
    """Of what is made in `run()`, on the meta device, the most that lives at once."""
    with torch.device("meta"), FusedAttention(), LiveBytes() as live:
        run()
    return live.most
