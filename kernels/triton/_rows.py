"""What the row kernels share on the device: moments of the rows of a tile, in float32."""

import triton
import triton.language as tl

# A tile is [ROWS, BLOCK_D]: whole rows in registers, zero where `inside` is false.


@triton.jit
def moments(x, inside, channels):
    """Return (x - mean [ROWS, D], variance [ROWS]) of the rows of a tile; zero outside."""
    mean = tl.sum(x, axis=1) / channels
    # Masked lanes would add mean**2 to the variance.
    centered = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / channels
    return centered, variance
