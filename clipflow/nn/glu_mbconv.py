"""Mix-FFN: a gated inverted-bottleneck convolution on image tokens.

    y = W_point ( a * SiLU(g) ),  (a, g) = depthwise3x3( SiLU( W_inverted x + b ) )

Source: Xie et al., "SANA" (2024), section 2.2 (Mix-FFN).
"""

# Shape suffixes: B = batch, N = h*w tokens, D = channels, M = hidden channels of one half.

from torch import Tensor, nn
from torch.nn import functional as F

from clipflow import ops


class GLUMBConv(nn.Module):
    """Feed-forward block that also mixes each token with its eight neighbors.

    The weights keep the [out, in, 1, 1] shape of published checkpoints; the two 1x1 convolutions
    run as matrix products on tokens.

    Args:
        channels: D.
        expand_ratio: M = int(expand_ratio * D).
    """

    def __init__(self, channels: int, expand_ratio: float) -> None:
        super().__init__()
        hidden = int(expand_ratio * channels)
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Apply the block to `tokens` [B, h*w, D] lying row-major on `grid` = (h, w)."""
        x = F.linear(tokens, self.conv_inverted.weight.flatten(1), self.conv_inverted.bias)
        x = ops.glu_conv(x, self.conv_depth.weight, self.conv_depth.bias, grid, pre_silu=True)
        return F.linear(x, self.conv_point.weight.flatten(1))
