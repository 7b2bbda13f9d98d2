"""SwiGLU feed-forward layer: W2 (silu(W1 x) * W3 x).

Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.
"""

from torch import Tensor, nn

from clipflow import ops


class SwiGLUFeedForward(nn.Module):
    """Bias-free; `linear_1` is the gate, `linear_3` the other branch, `linear_2` leads back.

    Args:
        channels: D, of the tokens.
        hidden: M, of one branch.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, channels, bias=False)
        self.linear_3 = nn.Linear(channels, hidden, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [..., D] to [..., D]."""
        return self.linear_2(ops.swiglu(self.linear_1(tokens), self.linear_3(tokens)))
