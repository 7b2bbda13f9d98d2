"""GPU libraries with the same op."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor


def peers(inputs: tuple[Tensor, ...], options: dict[str, object]) -> dict[str, Callable]:
    """SiLU(a) * b of the installed libraries."""
    a, b = inputs
    if not a.is_cuda or find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers.functional import liger_swiglu

    return {"Liger": lambda: liger_swiglu(a, b)}
