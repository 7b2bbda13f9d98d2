"""Classifier-free guidance: v = v_null + g * (v_cond - v_null).

Source: Ho & Salimans, "Classifier-Free Diffusion Guidance" (2022).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# model(latents [R, C, h, w], timesteps [R] int64) -> velocity [R, C, h, w]
VelocityModel = Callable[[Tensor, Tensor], Tensor]


def rows_needed(batch: int, guidance_scale: float) -> int:
    """Rows the model is called with: null rows are dropped where they would count for nothing."""
    return batch if guidance_scale == 1.0 else 2 * batch


def combine(rows: Tensor, guidance_scale: float) -> Tensor:
    """Merge velocity rows [null, cond] of shape [2B, ...] into [B, ...], in float32."""
    null, cond = rows.to(torch.promote_types(rows.dtype, torch.float32)).chunk(2)
    return null + guidance_scale * (cond - null)


def guided_velocity(
    model: VelocityModel,
    latents: Tensor,
    timestep: int,
    *,
    guidance_scale: float,
    model_dtype: torch.dtype,
) -> Tensor:
    """Call `model` on rows [null, cond] (on [cond] alone at scale 1) and combine them.

    Args:
        model: takes the doubled batch; its condition rows are already in the order [null, cond].
        latents: [B, C, h, w] float32 state.
        timestep: integer time of all rows.
        guidance_scale: 1 means no guidance.
        model_dtype: dtype the latents are cast to for the model.

    Returns:
        [B, C, h, w] in the dtype of `latents`.
    """
    rows = latents.to(model_dtype)
    if guidance_scale != 1.0:
        rows = torch.cat([rows, rows])
    times = torch.full((rows.shape[0],), timestep, dtype=torch.int64, device=rows.device)
    velocity = model(rows, times).to(latents.dtype)
    return velocity if guidance_scale == 1.0 else combine(velocity, guidance_scale)
