"""Decode large pictures in tiles, with the result of decoding them whole.

DC-AE's low-resolution stages attend from everywhere to everywhere and run whole. What follows the
last attention (residual blocks, upsampling, norms of single pixels) sees a few neighbors only: it
runs in tiles of the picture, each with as many neighbors around it as its pixels depend on.
"""

# Shape suffixes: B = batch, C = channels, h, w = sides of the latent grid.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

from torch import Tensor, nn

from clipflow.acceleration import dc_ae_blocks

GRID = 4  # regions begin and end on multiples, as the convolutions' own tiles do

Span = tuple[int, int]


@dataclass(frozen=True)
class _Step:
    """One block after the last attention.

    `reach`: how many neighbors of its input, after the repetition of pixels where there is one, an
    output depends on to each side. `scale`: 2 where it doubles the picture, else 1; `repeats`
    whether it does so by repeating pixels before its convolution.
    """

    run: Callable[[Tensor], Tensor]
    reach: int
    scale: int = 1
    repeats: bool = False

    def needed(self, span: Span, size: int) -> Span:
        """The rows of the input, `size` rows, that the rows `span` of the output depend on."""
        begin, end = span
        if self.repeats:
            begin, end = begin - self.reach, end + self.reach
        begin, end = begin // self.scale, -(-end // self.scale)
        if not self.repeats:
            begin, end = begin - self.reach, end + self.reach
        return max(begin - begin % GRID, 0), min(end + -end % GRID, size)


def decode_tiled(decoder: nn.Module, latents: Tensor, tile_size: int) -> Tensor:
    """Pictures [B, 3, H, W] of `latents` [B, C, h, w] by diffusers' DC-AE `Decoder`, in tiles.

    Args:
        decoder: stock or accelerated.
        latents: of any size.
        tile_size: side of a tile in pixels of the picture, at least 1; neighbors come on top.
    """
    blocks = [block for stage in reversed(decoder.up_blocks) for block in stage]
    attentive = [i for i, block in enumerate(blocks) if hasattr(block, "attn")]
    first = attentive[-1] + 1 if attentive else 0
    features = dc_ae_blocks.enter(decoder, latents)
    for block in blocks[:first]:
        features = block(features)
    steps = [*map(_step, blocks[first:]), _last_step(decoder)]
    pictures = None
    H, W = (_sizes(steps, side)[-1] for side in features.shape[2:])
    for top, left in product(range(0, H, tile_size), range(0, W, tile_size)):
        rows, columns = (top, min(top + tile_size, H)), (left, min(left + tile_size, W))
        tile = _tile(features, steps, rows, columns)
        if pictures is None:
            pictures = tile.new_empty(len(latents), tile.shape[1], H, W)
        pictures[:, :, slice(*rows), slice(*columns)] = tile
    return pictures


def _step(block: nn.Module) -> _Step:
    if hasattr(block, "interpolate"):  # DCUpBlock2d
        return _Step(block, reach=1, scale=2, repeats=block.interpolate)
    return _Step(block, reach=2)  # ResBlock: two convolutions


def _last_step(decoder: nn.Module) -> _Step:
    run = partial(dc_ae_blocks.leave, decoder)
    if isinstance(decoder.conv_out, nn.Conv2d):
        return _Step(run, reach=1)
    return _Step(run, reach=1, scale=2, repeats=decoder.conv_out.interpolate)


def _sizes(steps: list[_Step], size: int) -> list[int]:
    """Rows before each step and after the last, of `size` rows before the first."""
    sizes = [size]
    for step in steps:
        sizes.append(sizes[-1] * step.scale)
    return sizes


def _spans(steps: list[_Step], span: Span, size: int) -> list[Span]:
    """The rows needed before each step, and at last `span` itself."""
    spans = [span]
    for step, rows in zip(reversed(steps), reversed(_sizes(steps, size)[:-1]), strict=True):
        spans.insert(0, step.needed(spans[0], rows))
    return spans


def _tile(features: Tensor, steps: list[_Step], rows: Span, columns: Span) -> Tensor:
    """The pixels `rows` x `columns` of the picture."""
    down = _spans(steps, rows, features.shape[2])
    across = _spans(steps, columns, features.shape[3])
    x, top, left = features, 0, 0
    for index, step in enumerate(steps):
        if index == 0 or step.scale > 1:  # elsewhere cutting costs more than it saves
            x = _crop(x, down[index], across[index], top, left)
            top, left = down[index][0], across[index][0]
        x = step.run(x)
        top, left = top * step.scale, left * step.scale
    return _crop(x, down[-1], across[-1], top, left)


def _crop(x: Tensor, rows: Span, columns: Span, top: int, left: int) -> Tensor:
    """`rows` x `columns` of a picture of which `x` begins at (top, left)."""
    return x[:, :, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
