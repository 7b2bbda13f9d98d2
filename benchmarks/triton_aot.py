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
    """Every Triton launch of `op`, forward and backward, at the largest of its promised cases."""
    device = torch.device("cpu")
    case = max(op.cases, key=lambda case: case.inputs(device, dtype)[0].numel())
    inputs = [tensor.requires_grad_() for tensor in case.inputs(device, dtype)]
    accepted = registry.TRITON_INTERPRETED
    registry.TRITON_INTERPRETED = True  # CPU tensors are refused elsewhere: nothing is run here
    try:
        with recorded_launches() as launches:
            out = op.public(*inputs, backend="triton", **case.options(device))
            out.backward(torch.zeros_like(out))
    finally:
        registry.TRITON_INTERPRETED = accepted
    return launches


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
