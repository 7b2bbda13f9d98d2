"""Training pairs of flow matching: noisy data, and the velocity to predict there.

    noisy = (1 - s) * data + s * noise,   target = noise - data

Source: Lipman et al., "Flow Matching for Generative Modeling" (2023), section 4.1, the optimal
transport path, with s = 1 - t as in Esser et al., "Scaling Rectified Flow Transformers" (2024).
"""

# Shape suffixes: B = samples; the other dimensions are any, the same in all tensors.

from __future__ import annotations

import random

import torch
from torch import Tensor

from clipflow.errors import ShapeError, check_floating, check_like, check_shape
from clipflow.registry import (
    Case,
    Op,
    eager,
    fake_out,
    native,
    register,
    triton,
    without_gradient,
)


def flow_interpolate(
    data: Tensor, noise: Tensor, sigmas: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Mix data with noise, and say which velocity leads from one to the other.

    Args:
        data: clean latents, [B, ...]; float32, bfloat16 or float16 (float64 on CPU and eager).
        noise: standard normal, shape, dtype and device of `data`.
        sigmas: s, the noise level of each sample, [B] float32 (or float64 with float64 data).
        backend: "auto", or one of "eager", "native", "triton".

    Returns:
        (noisy, target), both contiguous, with shape and dtype of `data`. Computed in float32, where
        1 - s, the two products, their sum and the difference are each rounded for themselves.
        Gradients exist on "eager" alone, which "auto" takes for them.

    Raises:
        ShapeError: `noise` has not the shape of `data`, or `sigmas` is not [B].
        TypeError: a dtype or device is not one of the above.
        BackendUnavailable: the named backend cannot run this call.
    """
    if not data.ndim:
        raise ShapeError("flow_interpolate: data must be [B, ...], got []")
    check_floating("flow_interpolate", "data", data)
    check_shape("flow_interpolate", "noise", noise, data.shape)
    check_like("flow_interpolate", "noise", noise, "data", data)
    check_shape("flow_interpolate", "sigmas", sigmas, data.shape[:1])
    if sigmas.dtype is not torch.float32 or sigmas.device != data.device:
        _check_sigmas(sigmas, data)
    gradient = torch.is_grad_enabled() and (
        data.requires_grad or noise.requires_grad or sigmas.requires_grad
    )
    return OP.backends[OP.select(data, backend, gradient)].forward(data, noise, sigmas)


def _check_sigmas(sigmas: Tensor, data: Tensor) -> None:
    wide = sigmas.dtype is torch.float64 and data.dtype is torch.float64
    if not wide or sigmas.device != data.device:
        raise TypeError(
            f"flow_interpolate: sigmas must be float32 on {data.device} as data is, "
            f"got {sigmas.dtype} on {sigmas.device}"
        )


def reference(data: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The meaning of the op, in float32 (float64 data stays float64)."""
    wide = torch.promote_types(data.dtype, torch.float32)
    level = sigmas.to(wide).view(-1, *[1] * (data.ndim - 1))
    clean, noise_wide = data.to(wide), noise.to(wide)
    noisy = (1.0 - level) * clean + level * noise_wide
    return noisy.to(data.dtype), (noise_wide - clean).to(data.dtype)


def _native(data: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    if data.dtype is torch.float64:
        sigmas = sigmas.double()
    data = data if data.is_contiguous() else data.contiguous()
    noise = noise if noise.is_contiguous() else noise.contiguous()
    sigmas = sigmas if sigmas.is_contiguous() else sigmas.contiguous()
    noisy, target = torch.empty_like(data), torch.empty_like(data)
    _interpolate_op(data, noise, sigmas, noisy, target)
    return noisy, target


def _triton(data: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    from clipflow.kernels.triton import flow_interpolate as kernel  # Triton is optional

    return kernel.forward(data.contiguous(), noise.contiguous(), sigmas.contiguous())


def _case(*shape: int) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        data, noise = torch.randn(2, *shape, device=device, dtype=dtype).unbind(0)
        return data, noise, torch.rand(shape[0], device=device)

    return Case(name="x".join(map(str, shape)), inputs=inputs)


def _any_case(rng: random.Random) -> Case:
    B, C = rng.randint(0, 5), rng.choice([rng.randint(1, 140), rng.randint(1, 6000)])
    return _case(*rng.choice([(B, C), (B, C, 1), (B,), (B, rng.randint(0, 3), 1 + C // 40, 5)]))


OP = register(
    Op(
        name="flow_interpolate",
        schemas={
            "flow_interpolate": "(Tensor data, Tensor noise, Tensor sigmas, Tensor(a!) noisy, "
            "Tensor(b!) target) -> ()",
        },
        fakes={"flow_interpolate": fake_out},
        public=flow_interpolate,
        reference=reference,
        backends={
            "eager": eager(reference),
            "native": without_gradient(native("flow_interpolate", _native)),
            "triton": without_gradient(triton(_triton)),
        },
        order=("native", "triton", "eager"),
        # One value a sample; odd sizes that leave a tail; the embedded model's latents; one row.
        cases=(
            _case(1, 8),
            _case(3, 5, 7, 11),
            _case(2, 32, 8, 8),
            _case(4),
        ),
        timed=tuple(
            _case(B, *shape)
            for shape in ((32, 16, 16), (32, 32, 32), (1792, 8, 8))
            for B in (8, 64, 256)
        ),
        of_length=lambda n: _case(2, 4, n),
        any_case=_any_case,
        traffic="read data and noise, write noisy and target",
        flops=lambda data, *_, **__: 4 * data.numel(),
        differentiable=False,
        exact=True,
    )
)

# Bound once: looking an op up by name costs 0.3 us a call.
_interpolate_op = torch.ops.clipflow.flow_interpolate.default
