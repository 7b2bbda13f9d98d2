"""Calls of registered ops, for the tests that iterate over the registry."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipflow.registry import Case, Op

DEVICES = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def run(op: Op, case: Case, inputs: tuple[Tensor, ...], backend: str) -> Tensor:
    return op.public(*inputs, **case.options(inputs[0].device), backend=backend)


def results(
    op: Op, case: Case, inputs: tuple[Tensor, ...], backend: str, d_y: Tensor | None = None
) -> dict[str, Tensor]:
    """The output "y" and the gradient of each input, "d_0", "d_1", ...; `d_y`: a wave if None."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    y = run(op, case, leaves, backend)
    if d_y is None:
        d_y = wave(y)
    grads = torch.autograd.grad(y, leaves, d_y.to(y.dtype))
    return {"y": y.detach()} | {f"d_{i}": grad for i, grad in enumerate(grads)}


def wave(like: Tensor) -> Tensor:
    """Numbers between -1 and 1 with no pattern to speak of, the same in every dtype."""
    count = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    return torch.sin(count * 12.9898 + 0.1).to(like.dtype).view(like.shape)


def assert_as_close_as_eager(
    actual: dict[str, Tensor], op: Op, case: Case, inputs: tuple[Tensor, ...]
) -> None:
    """Allow twice the error that eager PyTorch has in the same dtype against float64, + 1 ulp."""
    d_y = wave(actual["y"])
    truth = results(op, case, tuple(t.double() for t in inputs), "eager", d_y)
    eager = results(op, case, inputs, "eager", d_y)
    for name, value in actual.items():
        allowed = 2 * (eager[name].double() - truth[name]).abs().amax()
        # Float64 has no wider truth to measure eager against: allow some steps of rounding.
        steps = 16 if value.dtype == torch.float64 else 1
        allowed += steps * torch.finfo(value.dtype).eps * truth[name].abs().amax()
        error = (value.double() - truth[name]).abs().amax()
        assert error <= allowed, f"{op.name} {name}: error {error:.3e}, allowed {allowed:.3e}"


class Recorder(TorchDispatchMode):
    """Collects the compiled clipflow ops called inside a `with` block, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "clipflow":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))
