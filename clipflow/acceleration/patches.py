"""Tokens of patches as an image."""

# Shape suffixes: B = batch, C = channels, p = side of a patch.

from torch import Tensor


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """[B, h*w, p*p*C], lying row-major on `grid` = (h, w), as an image [B, C, h*p, w*p]."""
    patches = tokens.unflatten(-1, (patch, patch, -1)).unflatten(1, grid)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
