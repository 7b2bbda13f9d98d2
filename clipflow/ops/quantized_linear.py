"""Linear layer in 8 bits: activations quantized per token, weights per output channel.

    x_scales[m] = max |x[m, :]| / most,   q[m, :] = round(x[m, :] / x_scales[m]), half to even
    y[m, n] = (sum over k of q[m, k] * values[n, k]) * x_scales[m] * scales[n] + bias[n]

where most is 127 for int8 and 448 for float8_e4m3fn, whose own rounding takes the place of round.
The sums of int8 products are exact.

Source: Dettmers et al., "LLM.int8()" (2022), section 2.1, row- and column-wise quantization;
Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
"""

# Shape suffixes: M = tokens, K = input channels, N = output channels, P = panels of 16 output
# channels, G = groups of 16 input channels.

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipflow import extension
from clipflow.errors import (
    FLOATING,
    ShapeError,
    check_dims,
    check_floating,
    check_no_gradient,
    check_result,
    check_shape,
)
from clipflow.registry import (
    Case,
    Implementation,
    Op,
    eager,
    fake_out,
    into,
    out_schema,
    register,
)

FP8 = torch.float8_e4m3fn
MOST = {torch.int8: 127.0, FP8: 448.0}
LEAST_SCALE = torch.finfo(torch.float32).tiny
MOST_INPUTS = 2**17  # sums of more int8 products could overflow 32 bits
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] in 8 bits, as `quantize_weight` makes it; replaces the one it was made of.

    Attributes:
        values: int8 on the CPU: uint8 tiles [P, G, 4, 16, 4] of value + 128, the one order that
            all CPU kernels read, N and K filled up to multiples of 16 with zeros. Otherwise [N, K].
        scales: one per output channel, [N], float32; value * scale is the weight.
        limits: for tiles: the largest sum of squares of activations in half a group for which
            16-bit sums are exact whatever the output channel, int32 [G, 2]; otherwise None.
        shape: (N, K).
        dtype: torch.int8 or torch.float8_e4m3fn.
    """

    values: Tensor
    scales: Tensor
    limits: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype

    def rows(self) -> Tensor:
        """The quantized values as a matrix [N, K]; a copy where they are kept in tiles."""
        if self.limits is None:
            return self.values
        N, K = self.shape
        P, G = self.values.shape[:2]
        rows = (self.values ^ 128).permute(0, 3, 1, 2, 4).reshape(P * 16, G * 16)
        return rows.view(torch.int8)[:N, :K]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the op multiplies by, [N, K]."""
        return self.rows().to(dtype) * self.scales[:, None].to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device, in the order that is read there."""
        return _ordered(self.rows().to(device), self.scales.to(device))


def quantize_weight(weight: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedWeight:
    """Quantize the weight of a linear layer per output channel, once, when a model is loaded.

    Args:
        weight: [N, K], N and K at least 1, K at most 131072; float32, bfloat16, float16 or float64.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Raises:
        ShapeError: `weight` is not [N, K] with sizes in these bounds.
        TypeError: a dtype is not one of the above.
        ValueError: `weight` holds NaN or infinity.
    """
    check_dims("quantize_weight", "weight", weight, "[N, K]")
    check_floating("quantize_weight", "weight", weight)
    if dtype not in MOST:
        raise TypeError(f"quantize_weight: dtype must be one of {list(MOST)}, got {dtype}")
    N, K = weight.shape
    if N < 1 or not 1 <= K <= MOST_INPUTS:
        raise ShapeError(
            f"quantize_weight: weight must be [N, K] with N >= 1 and 1 <= K <= {MOST_INPUTS}, "
            f"got {[N, K]}"
        )
    with torch.no_grad():
        values, scales = _quantize(weight, dtype)
        if not scales.isfinite().all():
            raise ValueError("quantize_weight: weight must be finite, got NaN or infinity")
        return _ordered(values, scales.float())


def quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    x_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply a linear layer with a quantized weight; quantize `x` per token on the way.

    Args:
        x: [..., K]; float32, bfloat16 or float16 (float64 with eager), or already quantized, as
            by `adaln_norm_quant`, in the dtype of `weight`.
        weight: from `quantize_weight`, on the device of `x`.
        bias: [N], any of the floating dtypes, on the device of `x`.
        x_scales: of an already quantized `x`, float32 [...]; otherwise None.
        dtype: of the output; None for the dtype of `x`, or float32 if that is quantized.
        out: a tensor to write the result into and to return, of its shape, dtype and device,
            contiguous, apart from all inputs; None for a new one. "eager", and "native" on CUDA,
            compute elsewhere and copy.
        backend: "auto", or one of "eager", "native".

    Returns:
        [..., N], contiguous, in `dtype`. Scales and bias are applied in float32. A token with a NaN
        or infinity is NaN. Not differentiable.

    Raises:
        ShapeError: `x`, `bias` or `x_scales` has not the shape above.
        TypeError: a dtype or device is not one of the above, or `weight` is not a QuantizedWeight.
        ValueError: `out` is not contiguous.
        RuntimeError: a gradient would be needed.
        BackendUnavailable: the named backend cannot run this call.
    """
    if type(weight) is not QuantizedWeight:
        raise TypeError(
            "quantized_linear: weight must be a QuantizedWeight, from quantize_weight, "
            f"got {type(weight).__name__}"
        )
    _check(x, weight, bias, x_scales)
    if dtype is None:
        dtype = x.dtype if x_scales is None else torch.float32
    elif dtype not in FLOATING:
        raise TypeError(f"quantized_linear: dtype must be one of {list(FLOATING)}, got {dtype}")
    if out is not None:
        shape = (*x.shape[:-1], weight.shape[0])
        check_result("quantized_linear", "out", out, shape, dtype, x.device)
        check_no_gradient("quantized_linear", x, bias, out)
    name = OP.select(x, backend, weight, dtype)
    if name == "eager":
        return into(out, reference(x, weight, bias, x_scales, dtype))
    return OP.backends[name].forward(x, weight, bias, x_scales, dtype, out)


def _check(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, x_scales: Tensor | None
) -> None:
    N, K = weight.shape
    shape, device = x.shape, x.device
    if len(shape) < 1 or shape[-1] != K:
        raise ShapeError(f"quantized_linear: x must be [..., {K}], got {list(shape)}")
    if weight.scales.device != device:
        raise TypeError(
            f"quantized_linear: weight must be on {device} as x is, got {weight.scales.device}"
        )
    if x_scales is None:
        check_floating("quantized_linear", "x", x)
    else:
        if x.dtype is not weight.dtype:
            raise TypeError(
                f"quantized_linear: x with x_scales must be {weight.dtype} as weight is, "
                f"got {x.dtype}"
            )
        check_shape("quantized_linear", "x_scales", x_scales, shape[:-1])
        if x_scales.dtype is not torch.float32 or x_scales.device != device:
            raise TypeError(
                f"quantized_linear: x_scales must be torch.float32 on {device}, "
                f"got {x_scales.dtype} on {x_scales.device}"
            )
    if bias is not None:
        check_shape("quantized_linear", "bias", bias, (N,))
        check_floating("quantized_linear", "bias", bias)
        if bias.device != device:
            raise TypeError(
                f"quantized_linear: bias must be on {device} as x is, got {bias.device}"
            )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("quantized_linear: has no gradient; call it under torch.no_grad()")


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values of `dtype` and the scale of each row, in float32 (float64 stays float64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(-1)
    scales = (largest / MOST[dtype]).clamp_min(LEAST_SCALE)
    scales = scales.masked_fill(largest == torch.inf, torch.nan)
    values = wide / scales[..., None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def _ordered(values: Tensor, scales: Tensor) -> QuantizedWeight:
    """`values` [N, K] in the order that the kernels of their device read."""
    N, K = values.shape
    dtype = values.dtype
    if dtype != torch.int8 or not values.is_cpu:
        return QuantizedWeight(values, scales, None, (N, K), dtype)
    P, G = -(-N // 16), -(-K // 16)
    padded = F.pad(values, (0, G * 16 - K, 0, P * 16 - N))
    squares = torch.ones(G, 2, dtype=torch.int32)
    for part in padded.split(256):
        fours = part.view(-1, G, 4, 2, 2).to(torch.int32)
        squares = torch.maximum(squares, fours.square().sum((2, 4)).amax(0).int())
    tiles = padded.view(torch.uint8).view(P, 16, G, 4, 4).permute(0, 2, 3, 1, 4) ^ 128
    return QuantizedWeight(tiles.contiguous(), scales, 32767**2 // squares, (N, K), dtype)


@torch.no_grad()
def reference(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    x_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    values, scales = (x, x_scales) if x_scales is not None else _quantize(x, weight.dtype)
    wide = scales.dtype
    y = F.linear(values.to(wide), weight.rows().to(wide))
    y = y * scales[..., None] * weight.scales.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return y.to(dtype or (x.dtype if x_scales is None else wide))


@torch.no_grad()
def _truth(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, **_: object) -> Tensor:
    """The layer whose weight is quantized, but not its activations."""
    bias = None if bias is None else bias.double()
    return F.linear(x.double(), weight.dequantized(torch.float64), bias)


def _native(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    x_scales: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    if not x.is_cpu:
        return into(out, _cuda(x, weight, bias, x_scales, dtype))
    if bias is not None and (bias.dtype is not torch.float32 or bias.requires_grad):
        bias = bias.detach().float()
    operands = (
        x.contiguous(),
        None if x_scales is None else x_scales.contiguous(),
        weight.values,
        weight.limits,
        weight.scales,
        None if bias is None else bias.contiguous(),
        DTYPES.index(dtype),
    )
    if out is None:
        return _op(*operands)
    _out_op(*operands, out)
    return out


@torch.no_grad()
def _cuda(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    x_scales: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """PyTorch's own 8-bit products, cuBLAS or CUTLASS."""
    N, K = weight.shape
    values, scales = (x, x_scales) if x_scales is not None else _quantize(x, weight.dtype)
    values, scales = values.reshape(-1, K).contiguous(), scales.reshape(-1, 1).contiguous()
    M = values.shape[0]
    if M == 0:
        return x.new_empty((*x.shape[:-1], N), dtype=dtype)
    if weight.dtype == FP8:  # by rows it has no output but bfloat16
        columns = weight.scales[None, :]
        y = torch._scaled_mm(values, weight.values.t(), scales, columns, out_dtype=torch.bfloat16)
    else:
        # Fewer than 17 rows are refused.
        padded = F.pad(values, (0, 0, 0, torch.sym_max(0, 17 - M)))
        y = torch._int_mm(padded, weight.values.t())[:M] * scales * weight.scales
    y = y if bias is None else y.float() + bias.float()
    return y.to(dtype).view(*x.shape[:-1], N)


_compiled_for = extension.native_devices("quantized_linear")
_has_avx2 = extension.build_facts().get("instruction_set") != "baseline"


def _refusal(
    x: Tensor, weight: QuantizedWeight | None = None, dtype: torch.dtype | None = None, *_: object
) -> str | None:
    if x.dtype == torch.float64 or dtype == torch.float64:
        return "has no float64 kernel"
    kind = None if weight is None else weight.dtype
    if x.is_cpu:
        if kind == FP8:
            return "has no float8 kernel for the CPU"
        if "cpu" not in _compiled_for:
            return "has no compiled kernel for device 'cpu'"
        return None if _has_avx2 else "is several times slower than eager without AVX2"
    if not x.is_cuda:
        return f"has no kernel for device {x.device.type!r}"
    if kind == FP8 and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "needs compute capability 8.9 for float8"
    least = 16 if kind == FP8 else 8
    if weight is not None and (weight.shape[0] % least or weight.shape[1] % least):
        return f"needs N and K to be multiples of {least} on CUDA, got {list(weight.shape)}"
    return None


def _fake(x, x_scales, weight, limits, scales, bias, dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[0]), dtype=DTYPES[dtype])


@functools.lru_cache(maxsize=4)
def _case_weight(N: int, K: int, device: torch.device) -> tuple[QuantizedWeight, Tensor]:
    """Normally distributed weight and bias, the same at every call."""
    generator = torch.Generator().manual_seed(N * 65537 + K)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    bias = torch.randn(N, generator=generator)
    return quantize_weight(weight.to(device)), bias.to(device)


def _case(B: int, L: int, K: int, N: int, *, bias: bool = True) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(B, L, K, device=device, dtype=dtype),)

    def options(device: torch.device) -> dict[str, object]:
        weight, shift = _case_weight(N, K, device)
        return {"weight": weight, "bias": shift} if bias else {"weight": weight}

    return Case(
        name=f"B{B}-L{L}-K{K}-N{N}" + ("" if bias else "-plain"), inputs=inputs, options=options
    )


def _any_case(rng: random.Random) -> Case:
    K = rng.choice([rng.randint(1, 140), rng.randint(1, 8192)])
    N = rng.choice([rng.randint(1, 40), rng.randint(1, max(1, 2**17 // K))])
    L = rng.randint(0, max(1, 2**15 // max(K, N)))
    return _case(rng.randint(0, 3), L, K, N, bias=rng.random() < 0.5)


SCHEMA = (
    "(Tensor x, Tensor? x_scales, Tensor weight, Tensor limits, Tensor scales, Tensor? bias,"
    " int dtype) -> Tensor"
)

OP = register(
    Op(
        name="quantized_linear",
        schemas={"quantized_linear": SCHEMA, "quantized_linear_out": out_schema(SCHEMA, "out")},
        fakes={"quantized_linear": _fake, "quantized_linear_out": fake_out},
        public=quantized_linear,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": Implementation(forward=_native, backward=None, refusal=_refusal),
        },
        order=("native", "eager"),
        # One token; odd sizes, without bias; a single input channel; whole tiles; many groups.
        cases=(
            _case(1, 1, 8, 8),
            _case(3, 17, 77, 35, bias=False),
            _case(2, 5, 1, 3),
            _case(2, 64, 192, 192),
            _case(1, 67, 1100, 50),
        ),
        # Attention and feed-forward layers of DiTs of width 2240 and 1792.
        timed=tuple(
            _case(2, L, K, N)
            for K, N in (
                (2240, 2240), (2240, 6720), (5600, 2240),
                (1792, 1792), (1792, 4864), (4864, 1792), (2240, 11200),
            )
            for L in (64, 256)
        ),
        of_length=lambda L: _case(2, L, 24, 40),
        any_case=_any_case,
        traffic="read x and the 8-bit weight, write y",
        flops=lambda x, weight, *_, **__: 2 * x.numel() * weight.shape[0],
        differentiable=False,
        truth=_truth,
    )
)  # fmt: skip

# Bound once: looking an op up by name costs 0.3 us a call.
_op = torch.ops.clipflow.quantized_linear.default
_out_op = torch.ops.clipflow.quantized_linear_out.default
