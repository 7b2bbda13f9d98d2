"""Load the compiled extension at import, so that dispatch later reads plain facts.

Dispatch runs under torch.compile, which cannot trace an import or a dispatcher query.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch  # loads libtorch, which the extension links to

# A built but broken extension raises here: that is a bug, not a reason to fall back.
LOADED = importlib.util.find_spec("clipflow._C") is not None
_C = importlib.import_module("clipflow._C") if LOADED else None


def native_devices(op: str) -> frozenset[str]:
    """Device types for which the extension holds a kernel of `op`."""
    name = f"clipflow::{op}"
    # Asking for the key of an op that no compiled file registers raises.
    if not LOADED or not torch._C._dispatch_has_kernel(name):
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(d for d in ("cpu", "cuda") if has_kernel(name, d.upper()))


def build_facts() -> dict[str, object]:
    """What was compiled and what was chosen at load; {} when there is no extension.

    Keys: compiler (str), cuda_archs (list of str), instruction_sets (list of str, what was
    compiled), instruction_set (str, what this machine runs).
    """
    return _C.build_facts() if _C is not None else {}
