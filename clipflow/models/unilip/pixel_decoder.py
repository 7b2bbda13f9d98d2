"""From CLIP features to pixels: `clip_down` compresses features to latents, DC-AE draws them.

Source: specs of UniLIP sections 2.3 and 2.6.
"""

# Shape suffixes: B = batch, N = h*w tokens, H = LM width, C = latent channels.

import math

from torch import Tensor, nn
from torch.nn import functional as F

from clipflow.errors import ShapeError
from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.dc_ae.decoder import DCAEDecoder

DOWN_BLOCKS = 3
BLOCK_NORM_EPS = 1e-6


class DownBlock(nn.Module):
    """x + MLP(LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=BLOCK_NORM_EPS),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class PixelDecoder(DCAEDecoder):
    """`clip_down` and the DC-AE decoder, under the reference's names."""

    def __init__(self, config: DecoderConfig, width: int) -> None:
        super().__init__(config)
        self.down_blocks = nn.ModuleList(DownBlock(width) for _ in range(DOWN_BLOCKS))
        self.down_mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.latent_channels),
            nn.GELU(),
            nn.Linear(config.latent_channels, config.latent_channels),
        )

    def clip_down(self, features: Tensor) -> Tensor:
        """Latents [B, C, h, w] of projected features [B, h*w, H] on a square grid."""
        side = math.isqrt(features.shape[1])
        if side * side != features.shape[1]:
            raise ShapeError(f"clip_down: N must be a square number, got {features.shape[1]}")
        for block in self.down_blocks:
            features = block(features)
        return self.down_mlp(features).transpose(1, 2).unflatten(2, (side, side))


def resize_pictures(pictures: Tensor, size: int, *, align_corners: bool = False) -> Tensor:
    """Bilinear resize of [B, 3, S, S] to `size`, half-pixel centers, no antialiasing."""
    if pictures.shape[-1] == size:
        return pictures
    return F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=align_corners)
