"""Norm layers of diffusers on `adaln_norm`."""

from __future__ import annotations

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from clipflow import ops
from clipflow.acceleration import checks
from clipflow.acceleration.replace import Replacement


def rms_norm(self: RMSNorm, hidden_states: Tensor) -> Tensor:
    """The forward of `RMSNorm`; tokens [B, L, D] in the dtype of the weight are normed at once."""
    x, weight = hidden_states, self.weight
    if x.ndim != 3 or weight.dtype is not x.dtype or torch.is_autocast_enabled(x.device.type):
        return type(self).forward(self, x)
    ones = x.new_zeros(x.shape[0], x.shape[2])  # a scale of 0 multiplies by 1
    return ops.adaln_norm(x, None, ones, weight=weight, norm="rms", eps=self.eps)


def check_rms_norm(name: str, norm: object) -> None:
    """Raise AccelerationError unless `norm` is an RMSNorm with a weight only."""
    checks.check_parameters(RMSNorm.forward, "hidden_states")
    checks.check_type(name, norm, RMSNorm)
    if norm.weight is None or norm.bias is not None:
        found = "an RMSNorm without a weight" if norm.weight is None else "an RMSNorm with a bias"
        raise checks.refuse(name, found, "a weight and no bias")


def rms_norm_replacement(name: str, norm: object) -> Replacement:
    """`norm` on `rms_norm`, if it is an RMSNorm with a weight only."""
    check_rms_norm(name, norm)
    return Replacement(name=name, module=norm, by=rms_norm, ops="adaln_norm")
