"""Depthwise 3x3 convolution of image tokens, with a gated activation: the middle of Mix-FFN.

    (a, g) = conv3x3(u) + bias,   y = a * SiLU(g),   u = x, or SiLU(x) with pre_silu

where a is the first half of the convolved channels and g the last.

Source: Xie et al., "SANA" (2024), section 2.2 (Mix-FFN); DC-AE (2024) has the same block.
"""

# Shape suffixes: B = batch, N = h*w tokens, M = hidden channels of one half.

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import (
    ShapeError,
    check_dims,
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

Grid = tuple[int, int]


def glu_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: Grid,
    *,
    pre_silu: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mix each token with its eight neighbors, channel by channel, then gate half of the channels.

    Args:
        x: tokens, [B, h*w, 2M], lying row-major on the grid; float32, bfloat16 or float16 (float64
            on CPU and eager). Any stride between tokens.
        weight: depthwise kernels, [2M, 1, 3, 3] as in published checkpoints, dtype and device of
            `x`. Places outside of the grid add nothing.
        bias: [2M], as `weight`.
        grid: (h, w), each at least 1.
        pre_silu: apply SiLU to `x` before the convolution.
        out: a tensor to write the result into and to return, of its shape, dtype and device,
            contiguous, apart from all inputs; None for a new one. "eager" computes elsewhere and
            copies.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        [B, h*w, M], contiguous, dtype of `x`; computed in float32. Differentiable in `x`, `weight`
        and `bias`; gradients are deterministic.

    Raises:
        ShapeError: `x` is not [B, h*w, 2M], `weight` not [2M, 1, 3, 3], `bias` not [2M], or `grid`
            has no tokens.
        TypeError: a dtype or device is not one of the above.
        ValueError: `out` is not contiguous.
        RuntimeError: `out` is given where a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    _check(x, weight, bias, grid)
    if out is not None:
        B, N, C = x.shape
        check_result("glu_conv", "out", out, (B, N, C // 2), x.dtype, x.device)
        check_no_gradient("glu_conv", x, weight, bias, out)
    name = OP.select(x, backend)
    if name == "eager":
        return into(out, reference(x, weight, bias, grid, pre_silu))
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _GLUConv.apply(x, weight, bias, grid, pre_silu, name)
    return OP.backends[name].forward(x, weight, bias, grid, pre_silu, out)


def _check(x: Tensor, weight: Tensor, bias: Tensor, grid: Grid) -> None:
    check_dims("glu_conv", "x", x, "[B, h*w, 2M]")
    check_floating("glu_conv", "x", x)
    h, w = grid
    if h < 1 or w < 1:
        raise ShapeError(f"glu_conv: grid must be (h, w), each at least 1, got {tuple(grid)}")
    _, N, C = x.shape
    if h * w != N or C < 2 or C % 2:
        raise ShapeError(f"glu_conv: x must be [B, {h}*{w}, 2M], got {list(x.shape)}")
    check_shape("glu_conv", "weight", weight, (C, 1, 3, 3))
    check_shape("glu_conv", "bias", bias, (C,))
    check_like("glu_conv", "weight", weight, "x", x)
    check_like("glu_conv", "bias", bias, "x", x)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, grid: Grid, pre_silu: bool = False
) -> Tensor:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    u = F.silu(x.to(wide)) if pre_silu else x.to(wide)
    image = F.conv2d(
        _image(u, grid), weight.to(wide), bias.to(wide), padding=1, groups=weight.shape[0]
    )
    value, gate = _tokens(image).chunk(2, dim=-1)
    return (value * F.silu(gate)).to(x.dtype)


def _image(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, h*w, C] seen as [B, C, h, w], which lies channels-last."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def _tokens(image: Tensor) -> Tensor:
    """[B, C, h, w] as [B, h*w, C]; a view where it lies channels-last."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


class _GLUConv(torch.autograd.Function):
    """Gradients of every backend that autograd cannot look into."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, grid: Grid, pre_silu: bool, backend: str
    ) -> Tensor:
        return OP.backends[backend].forward(x, weight, bias, grid, pre_silu)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, ctx.grid, ctx.pre_silu, ctx.backend = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, grad: Tensor):
        backward = OP.backends[ctx.backend].backward
        d_x, d_weight, d_bias = backward(grad, *ctx.saved_tensors, ctx.grid, ctx.pre_silu)
        return d_x, d_weight, d_bias, None, None, None


def _rows(x: Tensor) -> Tensor:
    """`x` with contiguous channels; the strides between tokens and samples stay free."""
    return x if x.stride(2) == 1 else x.contiguous()


def _native(
    x: Tensor, weight: Tensor, bias: Tensor, grid: Grid, pre_silu: bool, out: Tensor | None = None
) -> Tensor:
    operands = (_rows(x), weight.contiguous(), bias.contiguous(), *grid, pre_silu)
    if out is None:
        return _forward_op(*operands)
    _out_op(*operands, out)
    return out


def _native_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, grid: Grid, pre_silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own kernels: the convolution is done again, then taken back."""
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_x, wide_weight, wide_grad = (t.contiguous().to(wide) for t in (x, weight, grad))
    u = _image(F.silu(wide_x) if pre_silu else wide_x, grid)
    C = weight.shape[0]
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], C)  # stride, padding, dilation, ..., groups
    convolved = torch.ops.aten.convolution(u, wide_weight, bias.to(wide), *geometry)
    value, gate = _tokens(convolved).chunk(2, dim=-1)
    d_gate = torch.ops.aten.silu_backward(wide_grad * value, gate)
    d_convolved = _image(torch.cat([wide_grad * F.silu(gate), d_gate], dim=-1), grid)
    d_u, d_weight, d_bias = torch.ops.aten.convolution_backward(
        d_convolved, u, wide_weight, [C], *geometry, [True, True, True]
    )
    d_x = _tokens(d_u)
    if pre_silu:
        d_x = torch.ops.aten.silu_backward(d_x, wide_x)
    return d_x.to(x.dtype), d_weight.to(x.dtype), d_bias.to(x.dtype)


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor, grid: Grid, pre_silu: bool, out: Tensor | None = None
) -> Tensor:
    from clipflow.kernels.triton import glu_conv as kernel  # Triton is an optional dependency

    return kernel.forward(_rows(x), weight.contiguous(), bias.contiguous(), grid, pre_silu, out)


def _triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, grid: Grid, pre_silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from clipflow.kernels.triton import glu_conv as kernel  # Triton is an optional dependency

    return kernel.backward(
        grad.contiguous(), _rows(x), weight.contiguous(), bias.contiguous(), grid, pre_silu
    )


def _fake(x: Tensor, weight: Tensor, bias: Tensor, h: int, w: int, pre_silu: bool) -> Tensor:
    B, N, C = x.shape
    return x.new_empty(B, N, C // 2)


def _case(B: int, grid: Grid, M: int, *, pre_silu: bool = False) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.randn(B, grid[0] * grid[1], 2 * M, device=device, dtype=dtype)
        weight = torch.randn(2 * M, 1, 3, 3, device=device, dtype=dtype) / 3
        return x, weight, torch.randn(2 * M, device=device, dtype=dtype)

    return Case(
        name=f"B{B}-{grid[0]}x{grid[1]}-M{M}" + ("-pre_silu" if pre_silu else ""),
        inputs=inputs,
        options=lambda device: {"grid": grid, "pre_silu": pre_silu},
        shared=frozenset({1, 2}),
    )


def _any_case(rng: random.Random) -> Case:
    M = rng.choice([rng.randint(1, 70), rng.randint(1, 8192)])
    most = max(1, 2**14 // M)
    h = rng.randint(1, min(most, rng.choice([3, 80, 8192])))
    grid = (h, rng.randint(1, max(1, most // h)))
    if rng.random() < 0.5:
        grid = grid[::-1]
    B = rng.randint(0, 3 if 3 * M * grid[0] * grid[1] <= 2**14 else 1)
    return _case(B, grid, M, pre_silu=rng.random() < 0.5)


SCHEMA = "(Tensor x, Tensor weight, Tensor bias, SymInt h, SymInt w, bool pre_silu) -> Tensor"

OP = register(
    Op(
        name="glu_conv",
        schemas={"glu_conv": SCHEMA, "glu_conv_out": out_schema(SCHEMA, "out")},
        fakes={"glu_conv": _fake, "glu_conv_out": fake_out},
        public=glu_conv,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": native("glu_conv", _native, _native_backward),
            "triton": triton(_triton, _triton_backward),
        },
        order=("native", "triton", "eager"),
        # One token; odd sizes that leave a masked tail; the embedded model's block; more rows, then
        # more columns, than a kernel takes at a time.
        cases=(
            _case(1, (1, 1), 4),
            _case(3, (3, 5), 39),
            _case(2, (8, 8), 64, pre_silu=True),
            _case(1, (35, 2), 9, pre_silu=True),
            _case(2, (2, 67), 5),
        ),
        # The embedded model; the decoder of DC-AE; SANA-1.6B at 512 and at 1024 pixels.
        timed=(
            _case(2, (8, 8), 256, pre_silu=True),
            *(_case(1, (s, s), M, pre_silu=True) for s, M in ((8, 4096), (16, 4096), (16, 2048))),
            *(_case(1, (s, s), M, pre_silu=True) for s, M in ((32, 2048), (32, 1024), (64, 512))),
            *(_case(B, (16, 16), 5600, pre_silu=True) for B in (1, 2)),
            _case(1, (16, 16), 5600),
            *(_case(B, (32, 32), 5600, pre_silu=True) for B in (2, 1)),
            _case(1, (32, 32), 5600),
        ),
        of_length=lambda N: _case(2, (1, N), 12, pre_silu=True),
        any_case=_any_case,
        traffic="read x, write y, half as large; weight and bias are 20 values a channel of y",
        flops=lambda x, *_, **__: x.numel() // 2 * (36 + 8),
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.glu_conv.default
_out_op = torch.ops.clipflow.glu_conv_out.default
