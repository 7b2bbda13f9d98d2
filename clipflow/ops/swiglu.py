"""SwiGLU: one branch of a projection gates the other.

    y = silu(a) * b,   silu(a) = a / (1 + exp(-a))

Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.
"""

# Shape suffixes: D = channels of one branch.

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import (
    ShapeError,
    check_floating,
    check_like,
    check_no_gradient,
    check_result,
    check_shape,
)
from clipflow.registry import (
    Case,
    Op,
    eager,
    fake_out,
    into,
    native,
    out_schema,
    register,
    triton,
)


def swiglu(a: Tensor, b: Tensor, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Multiply `b` by the SiLU of `a`, in one pass.

    Args:
        a: the gate branch, [..., D], any rank; float32, bfloat16 or float16 (float64 on CPU and
            eager). The halves `a, b = projection.chunk(2, dim=-1)` are read without a copy.
        b: the other branch, shape, dtype and device of `a`.
        out: a tensor to write the result into and to return, of its shape, dtype and device,
            contiguous, apart from all inputs; None for a new one. "eager" computes elsewhere and
            copies.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        [..., D], contiguous, dtype of `a`; computed in float32, rounded once, where eager also
        rounds silu(a) to bfloat16 or float16. Differentiable in `a` and `b`.

        In float32 the rounding order is eager's: exp(-a), 1 + that, a over that, times b. "native"
        has the bits of PyTorch's vector code: on the CPU those that `F.silu(a) * b` has wherever
        it runs whole registers (instruction sets with fused multiply-add). Eager's own bits depend
        on the place and the number of threads: it gives the last values of a thread's share to
        another exp, and then about 4 % of the results differ, by at most 4 ulp.

    Raises:
        ShapeError: `a` has no dimension, or `b` not the shape of `a`.
        TypeError: a dtype or device is not one of the above.
        ValueError: `out` is not contiguous.
        RuntimeError: `out` is given where a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    if not a.ndim:
        raise ShapeError("swiglu: a must be [..., D], got []")
    check_floating("swiglu", "a", a)
    check_shape("swiglu", "b", b, a.shape)
    check_like("swiglu", "b", b, "a", a)
    if out is not None:
        check_result("swiglu", "out", out, a.shape, a.dtype, a.device)
        check_no_gradient("swiglu", a, b, out)
    name = OP.select(a, backend)
    if name == "eager":
        return into(out, reference(a, b))
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _SwiGLU.apply(a, b, name)
    return OP.backends[name].forward(a, b, out)


def reference(a: Tensor, b: Tensor) -> Tensor:
    """The meaning of the op, in the dtype of the inputs."""
    return F.silu(a) * b


class _SwiGLU(torch.autograd.Function):
    """Gradients of every backend that autograd cannot look into."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, backend: str) -> Tensor:
        return OP.backends[backend].forward(a, b)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        a, b, ctx.backend = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, grad: Tensor):
        a, b = ctx.saved_tensors
        return *OP.backends[ctx.backend].backward(grad, a, b), None


def _native(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        return _forward_op(a, b)
    _out_op(a, b, out)
    return out


def _native_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_op(grad, a, b)


def _triton(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    from clipflow.kernels.triton import swiglu as kernel  # Triton is an optional dependency

    return kernel.forward(a, b, out)


def _triton_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    from clipflow.kernels.triton import swiglu as kernel  # Triton is an optional dependency

    return kernel.backward(grad, a, b)


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


def _fake_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), a.new_empty(a.shape)


def _case(*shape: int, packed: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if packed:
            branches = torch.randn(*shape[:-1], 2 * shape[-1], device=device, dtype=dtype)
            return branches.chunk(2, dim=-1)
        return tuple(torch.randn(*shape, device=device, dtype=dtype) for _ in range(2))

    name = "x".join(map(str, shape)) + ("-packed" if packed else "")
    return Case(name=name, inputs=inputs)


def _any_case(rng: random.Random) -> Case:
    D = rng.choice([rng.randint(1, 140), rng.randint(1, 8192)])
    rows = rng.randint(0, max(1, 2**14 // D))
    shape = rng.choice([(rows, D), (2, rows, D), (rows, 1, D), (2, 1, rows, D), (D,)])
    return _case(*shape, packed=rng.random() < 0.5)


SCHEMA = "(Tensor a, Tensor b) -> Tensor"

OP = register(
    Op(
        name="swiglu",
        schemas={
            "swiglu": SCHEMA,
            "swiglu_out": out_schema(SCHEMA, "out"),
            "swiglu_backward": "(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)",
        },
        fakes={"swiglu": _fake, "swiglu_out": fake_out, "swiglu_backward": _fake_backward},
        public=swiglu,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": native("swiglu", _native, _native_backward),
            "triton": triton(_triton, _triton_backward),
        },
        order=("native", "triton", "eager"),
        # One token; odd sizes that leave a masked tail; halves of one projection.
        cases=(
            _case(1, 1, 8),
            _case(3, 17, 77),
            _case(3, 17, 77, packed=True),
            _case(4, 128, packed=True),
            _case(2, 64, 192),
        ),
        timed=tuple(
            _case(rows, D, packed=packed)
            for D in (4864, 5600, 8960)
            for rows in (128, 512, 2048, 4096)
            for packed in ((False, True) if rows == 512 else (True,))
        ),
        of_length=lambda L: _case(2, L, 24),
        any_case=_any_case,
        traffic="read a and b, write y",
        flops=lambda a, *_, **__: 5 * a.numel(),
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.swiglu.default
_out_op = torch.ops.clipflow.swiglu_out.default
_backward_op = torch.ops.clipflow.swiglu_backward.default
