"""Rotary tables of language models that were built without memory for their weights."""

from __future__ import annotations

import torch
from torch import nn


def materialize_rotary(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Compute the rotary tables of a model that was built on the meta device, in float32.

    They are no part of a checkpoint, so nothing loads them.

    Args:
        model: whose submodules with a table `inv_freq` are transformers' own, made of a `config`.
        device: where the tables go.
    """
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "config"):
            # On the CPU, so that every device gets the same table.
            with torch.device("cpu"):
                fresh = type(module)(module.config)
            for name, table in fresh.named_buffers():
                module.register_buffer(name, table.to(device), persistent=False)
