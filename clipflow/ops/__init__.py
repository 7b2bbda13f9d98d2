"""The fused ops. Importing this package registers them; models call them from here."""

from clipflow.ops.adaln_norm import adaln_norm
from clipflow.ops.clip_normalize import clip_normalize
from clipflow.ops.dit_attention import dit_attention
from clipflow.ops.linear_attention import linear_attention
from clipflow.registry import all_ops, explain, use_backend

__all__ = [
    "adaln_norm",
    "all_ops",
    "clip_normalize",
    "dit_attention",
    "explain",
    "linear_attention",
    "use_backend",
]
