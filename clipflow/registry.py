"""The table of fused ops: what each means, who can run it, and where it is promised to work.

`clipflow.ops` fills the table; tests, benchmarks and `clipflow doctor` iterate over it.

Choice of a backend, first match wins: the `backend=` argument, the innermost `use_backend`, the
environment variable CLIPFLOW_BACKEND (read once, at import), "auto". "auto" takes the first
willing backend of the op's own order; a backend named in any of the other ways never falls back.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipflow import extension
from clipflow.errors import BackendUnavailable

NAMESPACE = "clipflow"
BACKENDS = ("auto", "eager", "native", "triton")
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Output = Tensor | tuple[Tensor, ...]

_library = torch.library.Library(NAMESPACE, "DEF")
_ops: dict[str, Op] = {}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One working point: a name for test ids, and the arguments it stands for.

    `inputs(device, dtype)` returns the floating tensors, in positional order, which are the ones to
    differentiate; `options(device)` the keyword arguments of the public function that go with them.
    Inputs at the positions `shared` have no batch dimension, such as weights; the first dimension
    of all others is the batch. Where some arguments before the last input are left out, or are
    keyword-only, `names` has the argument's name of each input.
    """

    name: str
    inputs: Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]
    options: Callable[[torch.device], dict[str, object]] = lambda device: {}
    shared: frozenset[int] = frozenset()
    names: tuple[str, ...] = ()

    def of(self, function: Callable[..., Output]) -> Callable[..., Output]:
        """`function` with this case's inputs as its positional arguments."""
        if not self.names:
            return function
        return lambda *inputs, **options: function(
            **dict(zip(self.names, inputs, strict=True)), **options
        )


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """How one backend runs an op.

    `refusal(x, *details)` returns why it cannot run a call whose first tensor is `x`, or None;
    `details` is whatever more the op tells it. `backward` is None where autograd differentiates
    `forward` itself, as it does for eager, and where the op has no gradient.
    """

    forward: Callable[..., Output]
    backward: Callable[..., Tensor | tuple[Tensor | None, ...]] | None
    refusal: Callable[..., str | None]


@dataclass(frozen=True, kw_only=True)
class Op:
    """A fused op. `reference` is its meaning; every backend must agree with it.

    Attributes:
        schemas, fakes: the compiled ops, forward and backward, that share the op's name.
        public: what users call; its keyword `backend` chooses.
        order: what "auto" tries, set by measurement.
        cases: small working points, tested in every way; the second has odd sizes.
        timed: the sizes of real models, which benchmarks time.
        of_length: the working point with that many tokens, everything else the same.
        any_case: a working point drawn at random, for property tests: sizes, broadcast forms and
            options anywhere in what the op promises, with at most about 2**16 elements.
        traffic: bytes that must be moved, in words and symbols, e.g. "read x, write y".
        flops: arithmetic operations of a call, from its inputs and options.
        differentiable: whether the op has gradients.
        exact: whether every backend has eager's very bits in float32.
        in_place: the positions at which a tensor of `out` may be the input of the same position.
        batch_invariant: whether a sample's bits are the same in every batch and thread count.
        truth: exact values in float64 from (inputs, options), to measure errors against, where
            that is not the reference on float64 inputs: for ops that round on purpose.
        decoded: what of the output to compare, as floating tensors; for quantized outputs.
    """

    name: str
    schemas: Mapping[str, str]
    fakes: Mapping[str, Callable[..., object]]
    public: Callable[..., Output]
    reference: Callable[..., Output]
    backends: Mapping[str, Implementation]
    order: tuple[str, ...]
    cases: tuple[Case, ...]
    timed: tuple[Case, ...]
    of_length: Callable[[int], Case]
    any_case: Callable[[random.Random], Case]
    traffic: str
    flops: Callable[..., int]
    differentiable: bool = True
    exact: bool = False
    in_place: frozenset[int] = frozenset()
    batch_invariant: bool = True
    truth: Callable[..., Output] | None = None
    decoded: Callable[[Output], Output] = lambda output: output

    def select(self, x: Tensor, backend: str, *details: object) -> str:
        """Return the name of the backend that runs a call on `x`.

        `details` is what the op's backends need to know beside `x` to say whether they can.

        Raises:
            BackendUnavailable: a backend was named and refuses. A named backend never falls back.
        """
        if backend == "auto":
            backend = _chosen
        if backend == "auto":
            for name in self.order:
                if self.backends[name].refusal(x, *details) is None:
                    return name
        reason = self.refusal(x, backend, *details)
        if reason is not None:
            raise BackendUnavailable(f"{self.name}: backend {backend!r} {reason}")
        return backend

    def refusal(self, x: Tensor, backend: str, *details: object) -> str | None:
        """Why `backend` cannot run a call on `x`, or None."""
        if backend not in self.backends:
            return f"is not one of {sorted(self.backends)}"
        return self.backends[backend].refusal(x, *details)


def register(op: Op) -> Op:
    """Enter `op` in the table; declare its schemas and fake kernels, once for all devices."""
    for name, schema in op.schemas.items():
        _library.define(name + schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", op.fakes[name], lib=_library)
    _ops[op.name] = op
    return op


def all_ops() -> tuple[Op, ...]:
    """Every registered op, in the order of registration; `import clipflow.ops` registers them."""
    return tuple(_ops.values())


def out_schema(schema: str, *results: str) -> str:
    """The schema of `<op>_out`: that of `<op>`, writing into tensors given for its results."""
    arguments = schema[: schema.rindex(") -> ")]
    given = [f"Tensor({mark}!) {name}" for mark, name in zip("abc", results, strict=False)]
    return f"{', '.join([arguments, *given])}) -> ()"


def fake_out(*_: object) -> None:
    """The fake kernel of an op whose results are arguments."""


def into(out: Output | None, result: Output) -> Output:
    """`result`, copied into the tensors of `out` where they are given."""
    if out is None:
        return result
    if isinstance(out, Tensor):
        return out.copy_(result)
    for target, value in zip(out, result, strict=True):
        target.copy_(value)
    return tuple(out)


def eager(reference: Callable[..., Output]) -> Implementation:
    """Plain PyTorch, which runs anywhere and which autograd differentiates."""
    return Implementation(forward=reference, backward=None, refusal=lambda x, *_: None)


def native(
    name: str,
    forward: Callable[..., Output],
    backward: Callable[..., Tensor | tuple[Tensor | None, ...]] | None = None,
) -> Implementation:
    """The compiled kernel `clipflow::<name>`; PyTorch picks CPU or CUDA by the tensors' device."""
    devices = extension.native_devices(name)
    on_cpu, on_cuda = "cpu" in devices, "cuda" in devices

    def refusal(x: Tensor, *_: object) -> str | None:
        if (on_cpu and x.is_cpu) or (on_cuda and x.is_cuda and x.dtype != torch.float64):
            return None
        if on_cuda and x.is_cuda:
            return "has no float64 kernel for CUDA"
        kind = x.device.type
        return f"has no compiled kernel for device {kind!r} (built for: {sorted(devices)})"

    return Implementation(forward=forward, backward=backward, refusal=refusal)


def triton(
    forward: Callable[..., Output],
    backward: Callable[..., Tensor | tuple[Tensor | None, ...]] | None = None,
) -> Implementation:
    """A Triton kernel: CUDA tensors, or any tensor in Triton's interpreter (TRITON_INTERPRET=1)."""
    installed = importlib.util.find_spec("triton") is not None

    def refusal(x: Tensor, *_: object) -> str | None:
        if not installed:
            return "needs the package triton, which is not installed"
        if x.device.type != "cuda" and not TRITON_INTERPRETED:
            return f"needs a CUDA tensor, got one on {x.device.type!r}"
        if x.dtype == torch.float64:
            return "has no float64 kernel"
        return None

    return Implementation(forward=forward, backward=backward, refusal=refusal)


def without_gradient(backend: Implementation) -> Implementation:
    """`backend`, refusing calls that ask for a gradient, which would be lost in silence."""

    def refusal(x: Tensor, gradient: bool = False, *_: object) -> str | None:
        return "has no gradient" if gradient else backend.refusal(x)

    return Implementation(forward=backend.forward, backward=None, refusal=refusal)


def _checked(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


_chosen = _checked(os.environ.get("CLIPFLOW_BACKEND", "auto"), "CLIPFLOW_BACKEND")


def chosen_backend() -> str:
    """What `use_backend` or CLIPFLOW_BACKEND chose; "auto" where neither did."""
    return _chosen


class use_backend:
    """Run every op on `backend` inside the `with` block; "auto" undoes an outer choice.

    The choice holds for the whole process, all threads included.

    Raises:
        ValueError: there is no backend of that name.
    """

    def __init__(self, backend: str) -> None:
        self.backend = _checked(backend, "use_backend: backend")

    def __enter__(self) -> None:
        global _chosen
        self.outer = _chosen
        _chosen = self.backend

    def __exit__(self, *_: object) -> None:
        global _chosen
        _chosen = self.outer


@dataclass(frozen=True)
class Explanation:
    """Which backend a call takes (`chosen`, None if it raises) and why others refuse it.

    `refusals` has every backend of the op, in the order auto tries them; None means willing.
    """

    op: str
    chosen: str | None
    refusals: Mapping[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op}: runs on {self.chosen or 'nothing (raises BackendUnavailable)'}"]
        lines += [f"  {name}: {why or 'willing'}" for name, why in self.refusals.items()]
        return "\n".join(lines)


def explain(op: str | Callable[..., Tensor], x: Tensor, *_: object) -> Explanation:
    """Say which backend the call `op(x, ...)` takes now, and why the others refuse.

    Args:
        op: the op's name or its public function, e.g. "adaln_norm" or clipflow.ops.adaln_norm.
        x: the first tensor of the call; the rest of its arguments may follow.

    Raises:
        ValueError: there is no such op.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    table = {entry.name: entry for entry in all_ops()}
    if name not in table:
        raise ValueError(f"explain: op must be one of {', '.join(table)}, got {name!r}")
    entry = table[name]
    refusals = {backend: entry.refusal(x, backend) for backend in entry.order}
    try:
        chosen = entry.select(x, "auto")
    except BackendUnavailable:
        chosen = None
    return Explanation(op=name, chosen=chosen, refusals=refusals)
