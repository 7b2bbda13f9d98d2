"""Classifier-free guidance: v = v_null + g * (v_cond - v_null).

Source: Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# model(latents [R, C, h, w], timesteps [R] int64) -> velocity [R, C, h, w]
VelocityModel = Callable[[Tensor, Tensor], Tensor]


def is_guided(guidance_scale: float | Tensor) -> bool:
    """Whether the model needs null rows: they would count for nothing at the number 1."""
    return isinstance(guidance_scale, Tensor) or guidance_scale != 1.0


def model_rows(latents: Tensor, guidance_scale: float | Tensor, model_dtype: torch.dtype) -> Tensor:
    """What the model sees of `latents` [B, ...]: [B, ...], or with guidance [2B, ...]."""
    rows = latents.to(model_dtype)
    return torch.cat([rows, rows]) if is_guided(guidance_scale) else rows


def combine(rows: Tensor, guidance_scale: float) -> Tensor:
    """Merge velocity rows [null, cond] of shape [2B, ...] into [B, ...], in float32.

    Samplers do not need it: `clipflow.ops.flow_step` combines the rows that it is given.
    """
    null, cond = rows.to(torch.promote_types(rows.dtype, torch.float32)).chunk(2)
    return null + guidance_scale * (cond - null)
