"""The fused ops. Importing this package registers them; models call them from here."""

from clipflow.ops.adaln_norm import adaln_norm
from clipflow.ops.clip_normalize import clip_normalize
from clipflow.ops.flow_interpolate import flow_interpolate
from clipflow.ops.flow_step import flow_step
from clipflow.ops.glu_conv import glu_conv
from clipflow.ops.linear_attention import linear_attention
from clipflow.ops.qk_norm_rope import qk_norm_rope
from clipflow.ops.swiglu import swiglu
from clipflow.registry import all_ops, explain, use_backend

__all__ = [
    "adaln_norm",
    "all_ops",
    "clip_normalize",
    "explain",
    "flow_interpolate",
    "flow_step",
    "glu_conv",
    "linear_attention",
    "qk_norm_rope",
    "swiglu",
    "use_backend",
]
