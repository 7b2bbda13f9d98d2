"""The fused ops. Importing this package registers them; models call them from here."""

from clipflow.ops.adaln_norm import adaln_norm
from clipflow.ops.clip_normalize import clip_normalize
from clipflow.ops.qk_norm_rope import qk_norm_rope
from clipflow.ops.swiglu import swiglu
from clipflow.registry import all_ops, explain, use_backend

__all__ = [
    "adaln_norm",
    "all_ops",
    "clip_normalize",
    "explain",
    "qk_norm_rope",
    "swiglu",
    "use_backend",
]
