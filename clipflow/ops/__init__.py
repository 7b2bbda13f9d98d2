"""The fused ops. Importing this package registers them; models call them from here."""

from clipflow.ops.adaln_norm import adaln_norm
from clipflow.ops.adaln_norm_quant import adaln_norm_quant
from clipflow.ops.clip_normalize import clip_normalize
from clipflow.ops.dit_attention import dit_attention
from clipflow.ops.flow_interpolate import flow_interpolate
from clipflow.ops.flow_step import flow_step
from clipflow.ops.gated_residual_norm import gated_residual_norm
from clipflow.ops.glu_conv import glu_conv
from clipflow.ops.linear_attention import linear_attention
from clipflow.ops.qk_norm_rope import qk_norm_rope
from clipflow.ops.quantized_linear import QuantizedWeight, quantize_weight, quantized_linear
from clipflow.ops.sandwich_residual_norm import sandwich_residual_norm
from clipflow.ops.swiglu import swiglu
from clipflow.registry import all_ops, explain, use_backend

__all__ = [
    "QuantizedWeight",
    "adaln_norm",
    "adaln_norm_quant",
    "all_ops",
    "clip_normalize",
    "dit_attention",
    "explain",
    "flow_interpolate",
    "flow_step",
    "gated_residual_norm",
    "glu_conv",
    "linear_attention",
    "qk_norm_rope",
    "quantize_weight",
    "quantized_linear",
    "sandwich_residual_norm",
    "swiglu",
    "use_backend",
]
