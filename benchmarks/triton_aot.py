"""Compile Triton kernels for GPUs that are not there, exactly as their launchers would launch them.

The launchers run on CPU tensors while every launch is recorded instead of made; each recorded
launch then goes through Triton's own specialization (dtypes, divisibility by 16, constants, warps)
and compiler for the wanted architecture, down to the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from clipflow import registry
from clipflow.registry import Op

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One call `kernel[grid](*args, **kwargs)` of a launcher."""

    kernel: JITFunction
    args: tuple[object, ...]
    kwargs: dict[str, object]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers and local memory a thread, shared bytes a block."""

    kernel: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within the block, Triton kernels are not run: their launches are appended to the list."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object):
        launches.append(Launch(kernel, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def op_launches(op: Op, dtype: torch.dtype) -> list[Launch]:
    """Every Triton launch of `op`, forward and backward, the largest promised case first."""
    device = torch.device("cpu")
    cases = sorted(op.cases, key=lambda case: -case.inputs(device, dtype)[0].numel())
    accepted = registry.TRITON_INTERPRETED
    registry.TRITON_INTERPRETED = True  # CPU tensors are refused elsewhere: nothing is run here
    try:
        with recorded_launches() as launches:
            for case in cases:
                inputs = case.inputs(device, dtype)
                inputs = [tensor.requires_grad_(op.differentiable) for tensor in inputs]
                out = case.of(op.public)(*inputs, backend="triton", **case.options(device))
                if op.differentiable:
                    outs = [out] if isinstance(out, torch.Tensor) else list(out)
                    torch.autograd.grad(outs, inputs, [torch.zeros_like(o) for o in outs])
    finally:
        registry.TRITON_INTERPRETED = accepted
    return launches


def largest_launches(op: Op, dtype: torch.dtype) -> list[Launch]:
    """The first launch of each kernel in `op_launches`: that of the largest case."""
    first: dict[str, Launch] = {}
    for launch in op_launches(op, dtype):
        first.setdefault(launch.kernel.fn.__name__, launch)
    return list(first.values())


def compile_launch(launch: Launch, capability: int) -> tuple[Resources, bytes]:
    """Compile for `sm_<capability>` and return what the kernel takes, with its machine code."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    code = compiled.asm["cubin"]
    registers, stack = _registers_and_stack(code)
    resources = Resources(
        kernel=kernel.fn.__name__,
        arch=f"sm_{capability}",
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        threads=compiled.metadata.num_warps * 32,
    )
    return resources, code


def _registers_and_stack(code: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage must print REG and STACK, got {usage!r}")
    return int(found[1]), int(found[2])
