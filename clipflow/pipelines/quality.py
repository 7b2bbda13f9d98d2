"""How alike two pictures are: PSNR, mean absolute difference and SSIM."""

# Shape suffixes: H, W = rows and columns of a picture.

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

WINDOW = 7
K1, K2 = 0.01, 0.03


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB pictures of one size; inf if they are equal."""
    error = (_pixels(first) - _pixels(second)).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def mean_absolute_difference(first: Image.Image, second: Image.Image) -> float:
    """Mean |first - second| of two RGB pictures of one size, in [0, 1]."""
    return (_pixels(first) - _pixels(second)).abs().mean().item()


def ssim(first: Image.Image, second: Image.Image) -> float:
    """Structural similarity of two RGB pictures of one size, at least 7 x 7; 1 if they are equal.

    Uniform 7 x 7 windows that lie inside, sample covariance, data range 1, mean over channels.

    Source: Wang et al., "Image Quality Assessment" (2004); constants as in scikit-image.
    """
    x, y = _pixels(first), _pixels(second)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = unbiased * (_window_mean(x * x) - mean_x**2)
    var_y = unbiased * (_window_mean(y * y) - mean_y**2)
    covariance = unbiased * (_window_mean(x * y) - mean_x * mean_y)
    light = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_x + var_y + K2**2)
    return (light * structure).mean().item()


def _pixels(image: Image.Image) -> torch.Tensor:
    """[3, 1, H, W] float64 in [0, 1]."""
    array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)[:, None].double() / 255


def _window_mean(pixels: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(pixels, WINDOW, stride=1)
