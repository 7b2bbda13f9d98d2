"""Calls of registered ops, for the tests that iterate over the registry."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipflow.registry import TRITON_INTERPRETED, Case, Op, Output

DEVICES = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def backends_under_test(op: Op) -> list[str]:
    """All but the reference; Triton's interpreter has a process of its own, and nothing else in it.

    Run: TRITON_INTERPRET=1 pytest tests/test_ops.py tests/test_ops_properties.py
    """
    if TRITON_INTERPRETED:
        return [name for name in op.order if name == "triton"]
    return [name for name in op.order if name != "eager"]


def takes_out(op: Op) -> bool:
    """Whether the results can be written into tensors that the caller gives."""
    return "out" in inspect.signature(op.public).parameters


def run(op: Op, case: Case, inputs: tuple[Tensor, ...], backend: str) -> Output:
    return case.of(op.public)(*inputs, **case.options(inputs[0].device), backend=backend)


def tensors_of(output: Output) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def outs_like(output: Output) -> Output:
    """Tensors to write `output` into, full of what is not in it."""
    outs = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors_of(output))
    for out in outs:
        out.view(-1).view(torch.uint8).fill_(0x55)
    return outs[0] if isinstance(output, Tensor) else outs


def run_into(op: Op, case: Case, inputs: tuple[Tensor, ...], backend: str, out: Output) -> Output:
    options = case.options(inputs[0].device)
    return case.of(op.public)(*inputs, **options, out=out, backend=backend)


def outputs(op: Op, output: Output, prefix: str = "y") -> dict[str, Tensor]:
    """What of `output` is compared, by name: "y_0", "y_1", ..."""
    decoded = op.decoded(output)
    return {f"{prefix}_{i}": tensor for i, tensor in enumerate(tensors_of(decoded))}


def results(
    op: Op,
    case: Case,
    inputs: tuple[Tensor, ...],
    backend: str,
    d_y: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The outputs "y_0", ..., and the gradient of each input, "d_0", ..., where the op has them.

    `d_y` are the gradients of the outputs; waves if None.
    """
    if not op.differentiable:
        with torch.no_grad():
            return outputs(op, run(op, case, inputs, backend))
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    ys = outputs(op, run(op, case, leaves, backend))
    d_y = {name: wave(y) for name, y in ys.items()} if d_y is None else d_y
    seeds = [d_y[name].to(y.dtype) for name, y in ys.items()]
    grads = torch.autograd.grad(list(ys.values()), leaves, seeds)
    found = {name: y.detach() for name, y in ys.items()}
    return found | {f"d_{i}": grad for i, grad in enumerate(grads)}


def wave(like: Tensor) -> Tensor:
    """Numbers between -1 and 1 with no pattern to speak of, the same in every dtype."""
    count = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    # Not a sine alone: over the tokens of a sample it would sum to nothing but rounding errors.
    digits = (torch.sin(count * 12.9898 + 0.1) * 43758.5453).remainder(1)
    return (2 * digits - 1).to(like.dtype).view(like.shape)


def truth_of(op: Op, case: Case, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The exact results, computed in float64."""
    wide = tuple(t.double() for t in inputs)
    if op.truth is not None:
        return outputs(op, case.of(op.truth)(*wide, **case.options(inputs[0].device)))
    ys = outputs(op, run(op, case, inputs, "eager"))
    return results(op, case, wide, "eager", {name: wave(y) for name, y in ys.items()})


def assert_as_close_as_eager(
    actual: dict[str, Tensor],
    op: Op,
    case: Case,
    inputs: tuple[Tensor, ...],
    steps: int = 1,
) -> None:
    """Allow twice the error that eager PyTorch has in that dtype against float64, + `steps` ulp.

    `steps` of the largest value are for eager's luck: with few elements its error can be zero.
    """
    truth = truth_of(op, case, inputs)
    eager = results(op, case, inputs, "eager")
    for name, value in actual.items():
        if value.numel() == 0:
            assert value.shape == eager[name].shape, name
            continue
        allowed = 2 * (eager[name].double() - truth[name]).abs().amax()
        # Float64 has no wider truth to measure eager against: allow some steps of rounding.
        ulps = max(steps, 16) if value.dtype == torch.float64 else steps
        allowed += ulps * torch.finfo(value.dtype).eps * truth[name].abs().amax()
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
