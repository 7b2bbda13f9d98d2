"""The fused ops. Importing this package registers them; models call them from here."""

from clipflow.ops.adaln_norm import adaln_norm
from clipflow.ops.clip_normalize import clip_normalize
from clipflow.ops.quantized_linear import QuantizedWeight, quantize_weight, quantized_linear
from clipflow.registry import all_ops, explain, use_backend

__all__ = [
    "QuantizedWeight",
    "adaln_norm",
    "all_ops",
    "clip_normalize",
    "explain",
    "quantize_weight",
    "quantized_linear",
    "use_backend",
]
