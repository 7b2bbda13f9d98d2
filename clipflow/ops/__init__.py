"""The fused ops. Importing this package registers them; models call them from here."""

from clipflow.ops.adaln_norm import adaln_norm
from clipflow.ops.adaln_norm_quant import adaln_norm_quant
from clipflow.ops.clip_normalize import clip_normalize
from clipflow.ops.gated_residual_norm import gated_residual_norm
from clipflow.ops.sandwich_residual_norm import sandwich_residual_norm
from clipflow.registry import all_ops, explain, use_backend

__all__ = [
    "adaln_norm",
    "adaln_norm_quant",
    "all_ops",
    "clip_normalize",
    "explain",
    "gated_residual_norm",
    "sandwich_residual_norm",
    "use_backend",
]
