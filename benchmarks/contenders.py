"""Who is timed on a case of an op, and whether what it computes is right.

Contenders are the op's willing backends and its peers: "eager" (the op's reference), "inductor"
(the reference under torch.compile), and those that `benchmarks/peers/<op>.py` names, if there is
such a file: its `peers(inputs, options)` returns calls by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from clipflow.registry import Case, Op, Output

GENERAL_PEERS = ("eager", "inductor")


def backends_of(op: Op, case: Case, inputs: tuple[Tensor, ...]) -> dict[str, Callable]:
    """A call of each backend that is willing to run `op` on `inputs`, by its name."""
    public, options = case.of(op.public), case.options(inputs[0].device)
    return {
        name: partial(public, *inputs, backend=name, **options)
        for name in op.backends
        if op.refusal(inputs[0], name) is None
    }


def compiled(op: Op, case: Case, inputs: tuple[Tensor, ...]) -> Callable[[], Output]:
    """The op's reference under torch.compile at its best: static shapes, tuned on GPUs."""
    torch._dynamo.reset()  # no recompile limit
    mode = "max-autotune-no-cudagraphs" if inputs[0].is_cuda else None
    call = torch.compile(case.of(op.public), fullgraph=True, dynamic=False, mode=mode)
    return partial(call, *inputs, backend="eager", **case.options(inputs[0].device))


def special_peers(op: Op, case: Case, inputs: tuple[Tensor, ...]) -> dict[str, Callable]:
    """What `benchmarks/peers/<op>.py` puts beside the op: other libraries, or what it replaces."""
    name = f"benchmarks.peers.{op.name}"
    if importlib.util.find_spec(name) is None:
        return {}
    options = case.options(inputs[0].device) | dict(zip(case.names, inputs, strict=False))
    return importlib.import_module(name).peers(inputs, options)


def tensors(output: Output) -> tuple[Tensor, ...]:
    """The tensors of an output, one or several."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def error_meter(
    op: Op, case: Case, inputs: tuple[Tensor, ...]
) -> Callable[[Output], tuple[float, float]]:
    """A function of an output: its largest error against float64, and what is allowed.

    Allowed is twice eager's own error, plus one ulp. Of several outputs, the one that is furthest
    from what it is allowed.
    """
    wide, options = tuple(t.double() for t in inputs), case.options(inputs[0].device)
    run_eager = partial(case.of(op.public), backend="eager", **options)
    exact = case.of(op.truth)(*wide, **options) if op.truth else run_eager(*wide)
    truth = tensors(op.decoded(exact))
    eager = tensors(op.decoded(run_eager(*inputs)))
    allowed = [
        2 * (e.double() - t).abs().max().item() + torch.finfo(e.dtype).eps * t.abs().max().item()
        for e, t in zip(eager, truth, strict=True)
    ]

    def meter(output: Output) -> tuple[float, float]:
        found = tensors(op.decoded(output))
        errors = [(y.double() - t).abs().max().item() for y, t in zip(found, truth, strict=True)]
        return max(zip(errors, allowed, strict=True), key=lambda pair: pair[0] - pair[1])

    return meter
