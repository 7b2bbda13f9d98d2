"""Normalization of CLIP features, the space in which the generator works.

    l2:           y = p / max(|p|, eps)
    layer:        y = (p - mean(p)) / sqrt(var(p) + eps)
    standardize:  y = (p - mean[c]) / s[c], inverse y = p * s[c] + mean[c], s = max(std, eps)

where p is `x`, or the average of pool x pool neighbors on the square grid of its tokens.

Source: BLIP3-o (2025), section 3, diffuses pooled CLIP features; UniLIP (2025) standardizes them.
"""

# Shape suffixes: B = batch, N = tokens (side x side), C = channels.

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipflow.errors import ShapeError, check_dims, check_floating, check_shape
from clipflow.registry import Case, Op, eager, native, register, triton

MODES = ("l2", "layer", "standardize")


def clip_normalize(
    x: Tensor,
    *,
    mode: str = "l2",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    pool: int = 1,
    eps: float = 1e-6,
    inverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Normalize CLIP features per token, after an optional average pooling of the token grid.

    Args:
        x: features, [B, N, C]; float32, bfloat16 or float16 (float64 on CPU and eager).
        mode: "l2" (unit length), "layer" (zero mean, unit variance over channels) or
            "standardize" (per-channel `mean` and `std` of a data set).
        mean: [C], for "standardize" only, any of these dtypes, on the device of `x`; a constant.
        std: [C], as `mean`; a constant.
        pool: side of the pooled squares; pool=4 makes 8x8 tokens out of 32x32.
        eps: least length ("l2") or least `std` ("standardize"); added to the variance ("layer").
        inverse: undo "standardize"; not defined for the other modes or with pooling.
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        [B, N / pool**2, C], contiguous, dtype of `x`; computed in float32. Differentiable in `x`
        alone.

    Raises:
        ShapeError: `x` is not [B, N, C], its tokens make no square that `pool` divides, or `mean`
            or `std` is not [C].
        TypeError: a dtype or device is not one of the above.
        ValueError: a wrong mode, pool, or combination of arguments.
        BackendUnavailable: the named backend cannot run this call.
    """
    check_dims("clip_normalize", "x", x, "[B, N, C]")
    check_floating("clip_normalize", "x", x)
    _check_mode(x, mode, mean, std, pool, inverse)
    name = OP.select(x, backend)
    if name == "eager":
        return reference(x, mean, std, mode, pool, eps, inverse)
    if torch.is_grad_enabled() and x.requires_grad:
        return _ClipNormalize.apply(x, mean, std, mode, pool, eps, inverse, name)
    return OP.backends[name].forward(x, mean, std, mode, pool, eps, inverse)


def _check_mode(
    x: Tensor, mode: str, mean: Tensor | None, std: Tensor | None, pool: int, inverse: bool
) -> None:
    if mode == "standardize":
        _check_statistic("mean", mean, x)
        _check_statistic("std", std, x)
    elif mode not in MODES:
        raise ValueError(f"clip_normalize: mode must be one of {', '.join(MODES)}, got {mode!r}")
    elif mean is not None or std is not None:
        name = "std" if mean is None else "mean"
        raise ValueError(f"clip_normalize: {name} must be None in {mode}, got a tensor")
    if inverse and (mode != "standardize" or pool != 1):
        raise ValueError(
            "clip_normalize: inverse must go with mode 'standardize' and pool 1, "
            f"got mode {mode!r} and pool {pool}"
        )
    if pool < 1:
        raise ValueError(f"clip_normalize: pool must be at least 1, got {pool}")
    if pool > 1:
        side = math.isqrt(x.shape[1])
        if side * side != x.shape[1] or side % pool:
            raise ShapeError(
                f"clip_normalize: x must have N = side * side tokens with side a multiple of pool "
                f"{pool}, got N = {x.shape[1]}"
            )


def _check_statistic(name: str, statistic: Tensor | None, x: Tensor) -> None:
    if statistic is None:
        raise ValueError(f"clip_normalize: {name} must be a tensor [C] in standardize, got None")
    check_shape("clip_normalize", name, statistic, (x.shape[2],))
    check_floating("clip_normalize", name, statistic)
    if statistic.device != x.device:
        raise TypeError(
            f"clip_normalize: {name} must be on {x.device} as x is, got {statistic.device}"
        )


def reference(
    x: Tensor,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    mode: str = "l2",
    pool: int = 1,
    eps: float = 1e-6,
    inverse: bool = False,
) -> Tensor:
    """The meaning of the op, in float32 (float64 inputs stay float64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if pool > 1:
        side = math.isqrt(x.shape[1])
        grid = wide.unflatten(1, (side // pool, pool, side // pool, pool))
        wide = grid.mean(dim=(2, 4)).flatten(1, 2)
    if mode == "l2":
        y = F.normalize(wide, dim=-1, eps=eps)
    elif mode == "layer":
        y = F.layer_norm(wide, wide.shape[-1:], eps=eps)
    else:
        center = mean.detach().to(wide.dtype)
        spread = std.detach().to(wide.dtype).clamp_min(eps)
        y = wide * spread + center if inverse else (wide - center) / spread
    return y.to(x.dtype)


class _ClipNormalize(torch.autograd.Function):
    """Gradients of every backend that autograd cannot look into."""

    @staticmethod
    def forward(x, mean, std, mode, pool, eps, inverse, backend) -> Tensor:
        return OP.backends[backend].forward(x, mean, std, mode, pool, eps, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, _, std, *ctx.options, ctx.backend = inputs
        ctx.save_for_backward(x, std)

    @staticmethod
    @once_differentiable  # a second derivative raises; backend="eager" has it
    def backward(ctx, grad: Tensor):
        x, std = ctx.saved_tensors
        d_x = OP.backends[ctx.backend].backward(grad, x, std, *ctx.options)
        return d_x, None, None, None, None, None, None, None


def _native(
    x: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    pool: int,
    eps: float,
    inverse: bool,
) -> Tensor:
    x = x if x.is_contiguous() else x.contiguous()
    if mode == "standardize":
        mean, std = _wide(mean, x), _wide(std, x)
    return _forward_op(x, mean, std, MODES.index(mode), pool, eps, inverse)


def _native_backward(
    grad: Tensor, x: Tensor, std: Tensor | None, mode: str, pool: int, eps: float, inverse: bool
) -> Tensor:
    return _backward_op(
        grad.contiguous(), x.contiguous(), _wide(std, x), MODES.index(mode), pool, eps, inverse
    )


def _triton(
    x: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    mode: str,
    pool: int,
    eps: float,
    inverse: bool,
) -> Tensor:
    from clipflow.kernels.triton import clip_normalize as kernel  # Triton is optional

    return kernel.forward(x.contiguous(), _wide(mean, x), _wide(std, x), mode, pool, eps, inverse)


def _triton_backward(
    grad: Tensor, x: Tensor, std: Tensor | None, mode: str, pool: int, eps: float, inverse: bool
) -> Tensor:
    from clipflow.kernels.triton import clip_normalize as kernel  # Triton is optional

    wide = _wide(std, x)
    return kernel.backward(grad.contiguous(), x.contiguous(), wide, mode, pool, eps, inverse)


def _wide(statistic: Tensor | None, x: Tensor) -> Tensor | None:
    """`statistic` in the type the kernel computes in, as a constant."""
    if statistic is None:
        return None
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if statistic.dtype is wide and statistic.is_contiguous() and not statistic.requires_grad:
        return statistic
    return statistic.detach().to(wide).contiguous()


def _fake(x, mean, std, mode, pool, eps, inverse) -> Tensor:
    B, N, C = x.shape
    return x.new_empty(B, N // (pool * pool), C)


def _fake_backward(grad, x, std, mode, pool, eps, inverse) -> Tensor:
    return torch.empty_like(x)


def _case(
    B: int,
    N: int,
    C: int,
    mode: str,
    *,
    pool: int = 1,
    inverse: bool = False,
) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(B, N, C, device=device, dtype=dtype),)

    def options(device: torch.device) -> dict[str, object]:
        chosen: dict[str, object] = {"mode": mode, "pool": pool, "inverse": inverse}
        if mode == "standardize":
            channels = torch.arange(C, device=device, dtype=torch.float32)
            chosen |= {"mean": torch.sin(channels), "std": 1.5 + torch.cos(channels)}
        return chosen

    name = f"B{B}-N{N}-C{C}-{mode}" + (f"-pool{pool}" if pool > 1 else "")
    name += "-inverse" if inverse else ""
    return Case(name=name, inputs=inputs, options=options)


def _any_case(rng: random.Random) -> Case:
    C = rng.choice([rng.randint(1, 140), rng.randint(1, 8192)])
    mode, pool = rng.choice(MODES), rng.randint(1, 4)
    most = max(1, math.isqrt(2**15 // C) // pool)
    N = (pool * rng.randint(1, min(most, 4))) ** 2 if pool > 1 else rng.randint(0, most * most)
    inverse = mode == "standardize" and pool == 1 and rng.random() < 0.5
    return _case(rng.randint(0, 3), N, C, mode, pool=pool, inverse=inverse)


OP = register(
    Op(
        name="clip_normalize",
        schemas={
            "clip_normalize": "(Tensor x, Tensor? mean, Tensor? std, int mode, int pool, "
            "float eps, bool inverse) -> Tensor",
            "clip_normalize_backward": "(Tensor grad, Tensor x, Tensor? std, int mode, int pool, "
            "float eps, bool inverse) -> Tensor",
        },
        fakes={"clip_normalize": _fake, "clip_normalize_backward": _fake_backward},
        public=clip_normalize,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": native("clip_normalize", _native, _native_backward),
            "triton": triton(_triton, _triton_backward),
        },
        order=("native", "triton", "eager"),
        # One token; odd sizes that leave a tail; pooled grids.
        cases=(
            _case(1, 1, 8, "l2"),
            _case(3, 17, 77, "l2"),
            _case(2, 64, 192, "layer"),
            _case(3, 17, 77, "standardize"),
            _case(3, 17, 77, "standardize", inverse=True),
            _case(2, 36, 45, "l2", pool=2),
            _case(2, 36, 45, "layer", pool=3),
        ),
        timed=(
            *(_case(B, 256, C, mode) for B, C in ((1, 896), (8, 1792)) for mode in MODES),
            _case(2, 256, 896, "standardize", inverse=True),
            _case(2, 1024, 1792, "l2", pool=4),
            _case(2, 1024, 1792, "standardize", pool=4),
        ),
        of_length=lambda N: _case(2, N, 24, "standardize"),
        any_case=_any_case,
        traffic="read x, write y",
        flops=lambda x, *_, **__: 6 * x.numel(),
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_forward_op = torch.ops.clipflow.clip_normalize.default
_backward_op = torch.ops.clipflow.clip_normalize_backward.default
