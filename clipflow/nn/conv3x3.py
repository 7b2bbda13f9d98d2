"""3x3 convolutions of channels-last images; in float32 on CPUs with a quarter of the products.

Winograd's F(4x4, 3x3) makes sixteen outputs of 36 products where the sum itself has 144:

    Y = A^T [ (G g G^T) * (B^T d B) ] A      for every 6x6 tile d of the input and kernel g

with the points 0, +-3/4, +-3/2 and infinity, whose factors are exact in float32 and keep the error
near that of the plain sum (the usual 0, +-1, +-2 double it). Of an image enlarged by repeating
each pixel, nine products of neighbors' differences make four outputs. The products of all tiles
are one batched matrix product.

Source: Winograd, "Arithmetic Complexity of Computations" (1980); Lavin & Gray, "Fast Algorithms
for Convolutional Neural Networks" (2016), section 4; Barabasz et al., "Error Analysis and Improving
the Accuracy of Winograd Convolution for Deep Neural Networks" (2020), on the choice of points.
"""

# Shape suffixes: B = batch, C = input channels, K = output channels, T = tiles of a band.

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from clipflow.registry import chosen_backend

# (channels, pixels): with fewer the plain sum is faster, and more exact (measured on 2 cores).
LEAST, LEAST_REPEATED = (128, 1024), (48, 64)
BAND_TILES = 128  # tiles at a time: what they become stays in the caches

P, Q = 0.75, 1.5  # the points +-P and +-Q
SIDE = 4  # of the outputs of a tile

# G: the taps of a kernel to the factors of the products.
_AT_P, _AT_Q = 2 * P**2 * (P**2 - Q**2), 2 * Q**2 * (Q**2 - P**2)
_TILE = (
    (1 / (P * Q) ** 2, 0, 0),
    *((1 / _AT_P, p / _AT_P, P**2 / _AT_P) for p in (P, -P)),
    *((1 / _AT_Q, q / _AT_Q, Q**2 / _AT_Q) for q in (Q, -Q)),
    (0, 0, 1),
)
_REPEATED = ((1, 0, 0), (1, 1, 1), (0, 0, 1))


def conv3x3(image: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool = False) -> Tensor:
    """Convolve [B, H, W, C] with `weight` [K, C, 3, 3], zeros around; returns [B, H, W, K].

    Args:
        image: any strides; channels-last is fast.
        weight: as published, dtype of `image`.
        bias: [K] or None.
        silu: apply SiLU to the result.
    """
    H, W = image.shape[1:3]
    if H % SIDE == W % SIDE == 0 and _winograd(image, weight, bias, LEAST):
        return _bands(image, weight, bias, silu, _tile_products, step=SIDE, scale=1)
    y = F.conv2d(image.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
    return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


def repeated_conv3x3(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv3x3` of the image with every pixel repeated 2x2; returns [B, 2H, 2W, K]."""
    if _winograd(image, weight, bias, LEAST_REPEATED):
        return _bands(image, weight, bias, False, _repeated_products, step=1, scale=2)
    large = F.interpolate(image.permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    return F.conv2d(large, weight, bias, padding=1).permute(0, 2, 3, 1)


def _winograd(image: Tensor, weight: Tensor, bias: Tensor | None, least: tuple[int, int]) -> bool:
    """Whether this call gains from Winograd's form, and the form can have it."""
    if image.dtype is not torch.float32 or not image.is_cpu or image.numel() == 0:
        return False
    if type(image) is not Tensor or type(weight) not in (Tensor, Parameter):
        return False  # fake tensors and the like have no memory
    if min(weight.shape[:2]) < least[0] or image.shape[1] * image.shape[2] < least[1]:
        return False
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (image, weight, bias)
    ):
        return False
    compiled = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return not compiled and chosen_backend() != "eager"


_transformed = WeakTensorKeyDictionary()


def _factors(weight: Tensor, rows: tuple[tuple[float, ...], ...]) -> Tensor:
    """G g G^T as [len(rows)**2, C, K], kept until `weight` is written to, moved or freed.

    Writes that PyTorch does not count (`weight.data.copy_(...)`) are not seen.
    """
    storage = weight.untyped_storage()
    version = 0 if weight.is_inference() else weight._version
    kept = _transformed.get(weight)
    if kept is not None and kept[:2] == (version, rows) and kept[2].cdata == storage._cdata:
        return kept[3]
    g = torch.tensor(rows, dtype=torch.float64)
    wide = torch.einsum("ir,kcrs,js->ijck", g, weight.detach().double(), g)
    factors = wide.float().flatten(0, 1).contiguous()
    # While a weak reference is held, no other storage gets its address.
    _transformed[weight] = (version, rows, StorageWeakRef(storage), factors)
    return factors


def _bands(image, weight, bias, silu, products, *, step, scale) -> Tensor:
    """Every sample in bands of whole rows, `step` input rows to a row of tiles."""
    B, H, W, _ = image.shape
    y = image.new_empty(B, scale * H, scale * W, weight.shape[0])
    factors = _factors(weight, _TILE if products is _tile_products else _REPEATED)
    rows = step * max(1, BAND_TILES * step // W)
    for sample, drawn in zip(image, y, strict=True):
        for top in range(0, H, rows):
            end = min(top + rows, H)
            band = drawn[scale * top : scale * end]
            products(_padded(sample, top, end), factors, bias, band)
            if silu:
                F.silu(band, inplace=True)
    return y


def _padded(sample: Tensor, top: int, end: int) -> Tensor:
    """Rows top-1 .. end of `sample` [H, W, C] with a column more on both sides; zeros outside."""
    H, W, C = sample.shape
    padded = sample.new_empty(end - top + 2, W + 2, C)
    padded[:, 0], padded[:, -1] = 0, 0
    first, last = max(top - 1, 0), min(end + 1, H)
    if first == top:
        padded[0] = 0
    if last == end:
        padded[-1] = 0
    padded[first - top + 1 : last - top + 1, 1:-1] = sample[first:last]
    return padded


def _tile_products(padded: Tensor, factors: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the convolution of `padded` [4R+2, W+2, C] to `y` [4R, W, K]."""
    tiles = _tile_inputs(_tile_inputs(padded, dim=1), dim=1)  # [6, 6, R, W/4, C]
    m = torch.bmm(tiles.flatten(2, 3).flatten(0, 1), factors)
    m = m.view(*tiles.shape[:-1], y.shape[-1])
    y = y.unflatten(0, (-1, SIDE)).unflatten(2, (-1, SIDE)).permute(1, 3, 0, 2, 4)
    rows = m.new_empty(SIDE, *m.shape[1:])
    _tile_outputs(m, rows)
    _tile_outputs(rows.transpose(0, 1), y.transpose(0, 1))
    if bias is not None:
        y += bias


def _tile_inputs(x: Tensor, *, dim: int) -> Tensor:
    """B^T d along `dim`: of every six neighbors, at steps of four, the six factors."""
    n = (x.shape[dim] - 2) // SIDE
    d = [
        x.narrow(dim, i, SIDE * n - 3)[(slice(None),) * dim + (slice(None, None, 4),)]
        for i in range(6)
    ]
    out = x.new_empty(6, *d[0].shape)
    even, odd = torch.sub(d[4], d[2], alpha=P**2), torch.sub(d[3], d[1], alpha=P**2)
    torch.add(even, odd, alpha=Q, out=out[3])
    torch.sub(even, odd, alpha=Q, out=out[4])
    torch.sub(d[4], d[2], alpha=Q**2, out=even)
    torch.sub(d[3], d[1], alpha=Q**2, out=odd)
    torch.add(even, odd, alpha=P, out=out[1])
    torch.sub(even, odd, alpha=P, out=out[2])
    torch.sub(even, torch.sub(d[2], d[0], alpha=Q**2, out=out[0]), alpha=P**2, out=out[0])
    torch.sub(d[5], d[3], alpha=Q**2, out=out[5]).sub_(odd, alpha=P**2)
    return out


def _tile_outputs(m: Tensor, out: Tensor) -> None:
    """A^T m along the first dimension: six products to four outputs. Q = 2 P."""
    sums, differences = m[1:5:2] + m[2:5:2], m[1:5:2] - m[2:5:2]
    torch.add(m[0], sums[0], out=out[0]).add_(sums[1])
    torch.add(differences[0], differences[1], alpha=2, out=out[1]).mul_(P)
    torch.add(sums[0], sums[1], alpha=4, out=out[2]).mul_(P**2)
    differences = differences[0].add_(differences[1], alpha=8)
    torch.add(m[5], differences, alpha=P**3, out=out[3])


def _repeated_products(padded: Tensor, factors: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the convolution of `padded` [R+2, W+2, C], pixels repeated, to `y` [2R, 2W, K]."""
    K = y.shape[-1]
    tiles = _neighbor_differences(_neighbor_differences(padded, dim=1), dim=1)  # [3, 3, R, W, C]
    form = (3, 3, *tiles.shape[2:-1], K)
    m = torch.bmm(tiles.flatten(2, 3).flatten(0, 1), factors).view(form)
    if bias is not None:
        m[1, 1] += bias
    y = y.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).permute(1, 3, 0, 2, 4)  # [2, 2, R, W, K]
    half = m[:2] + m[1:]
    torch.add(half[:, :2], half[:, 1:], out=y)


def _neighbor_differences(x: Tensor, *, dim: int) -> Tensor:
    """(left neighbor - pixel, pixel, right neighbor - pixel) along `dim`, without its two ends."""
    n = x.shape[dim] - 2
    pixel = x.narrow(dim, 1, n)
    out = x.new_empty(3, *pixel.shape)
    torch.sub(x.narrow(dim, 0, n), pixel, out=out[0])
    out[1] = pixel
    torch.sub(x.narrow(dim, 2, n), pixel, out=out[2])
    return out
