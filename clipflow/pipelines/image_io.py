"""Pictures from and to files: every odd file ends in RGB or in one clear InputError."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from clipflow.errors import InputError

MAX_PIXELS = 25_000_000
# Not all that Pillow opens: for EPS it would start another program.
READABLE = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

ImageInput = str | Path | Image.Image | np.ndarray | Tensor


def load_image(source: ImageInput) -> Image.Image:
    """Read a picture as upright RGB; transparency is laid on white.

    Args:
        source: a path, a PIL image, an array [H, W, 3] (uint8, or float in [0, 1]) or a tensor
            [3, H, W] (the same).

    Raises:
        InputError: the file is missing, empty, broken or no picture, or has over 25 megapixels
            (refused from its header, before decoding); or `source` is nothing of the above.
    """
    if isinstance(source, (str, Path)):
        return _read_file(Path(source))
    if isinstance(source, Image.Image):
        _check_size(source, "the image")
        return _upright_rgb(source)
    if isinstance(source, Tensor):
        return _from_array(source.detach().cpu().permute(1, 2, 0) if source.ndim == 3 else source)
    if isinstance(source, np.ndarray):
        return _from_array(torch.from_numpy(np.array(source)))
    raise InputError(
        f"image must be a path, a PIL image, an array [H, W, 3] or a tensor [3, H, W], "
        f"got {type(source).__name__}"
    )


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture in the format of the path's suffix, whole or not at all.

    Raises:
        InputError: the suffix names no format that can be written, or the place is not writable.
    """
    path = Path(path)
    image_format = image_format_of(path)
    write_atomically(path, lambda file: image.save(file, format=image_format))


def image_format_of(path: str | Path) -> str:
    """Pillow's name for the format of a file name, e.g. "PNG"."""
    suffix = Path(path).suffix.lower()
    image_format = Image.registered_extensions().get(suffix)
    if image_format is None or image_format not in Image.SAVE:
        raise InputError(f"{path}: must end in .png, .jpg or .webp, got {suffix or 'no suffix'!r}")
    return image_format


def write_atomically(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Write beside `path`, then rename; an error leaves neither a new nor a half-written file.

    Raises:
        InputError: the place is not writable.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with beside.open("xb") as file:
                write(file)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_writable(path: str | Path) -> None:
    """Refuse, before any work is done, an output file that could not be written.

    Raises:
        InputError: its folder is missing or not writable, or the path is a folder.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise InputError(f"{path}: must be a file to write, got a folder")
    if not folder.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written: the folder {folder} is read-only")
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"{path}: cannot be written: the file is read-only")


def _read_file(path: Path) -> Image.Image:
    try:
        if not path.exists():
            raise InputError(f"{path}: no such image file")
        if not path.is_file():
            raise InputError(f"{path}: must be a picture, got a folder or a device")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: must be a picture, got an empty file (0 bytes)")
        with warnings.catch_warnings():
            # Pillow warns of large pictures at its own limit; ours is lower and is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=READABLE) as image:
                _check_size(image, str(path))
                image.load()
                return _upright_rgb(image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path}: must have at most {_megapixels(MAX_PIXELS)}, got more"
        ) from error
    except UnidentifiedImageError as error:
        wanted = "PNG, JPEG, WebP, BMP, GIF, TIFF or PPM"
        raise InputError(f"{path}: must be a picture ({wanted}), got something else") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        # Pillow reports damage as any of these, a broken PNG chunk even as SyntaxError.
        raise InputError(f"{path}: the image cannot be read: {_one_line(error)}") from error


def _check_size(image: Image.Image, name: str) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise InputError(
            f"{name}: must have at most {_megapixels(MAX_PIXELS)}, got {_megapixels(pixels)} "
            f"({image.width} x {image.height})"
        )
    if pixels == 0:
        raise InputError(f"{name}: must have pixels, got {image.width} x {image.height}")


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:.4g} megapixels"


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Deep gray values to 8 bits: 16-bit integers, or floats whose white is 1 or 255."""
    if np.issubdtype(values.dtype, np.integer):
        scale = 1.0 / 257.0
    else:
        scale = 255.0 if np.nanmax(values) <= 1.0 else 1.0
    wide = np.nan_to_num(values.astype(np.float64) * scale)
    return np.clip(np.rint(wide), 0, 255).astype(np.uint8)


def _from_array(values: Tensor) -> Image.Image:
    if values.ndim != 3 or values.shape[-1] != 3 or not values.numel():
        raise InputError(
            f"image must be an array [H, W, 3] or a tensor [3, H, W], got {list(values.shape)}"
        )
    if values.is_floating_point():
        values = (values.float() * 255).round().clamp(0, 255).to(torch.uint8)
    if values.dtype != torch.uint8:
        raise InputError(f"image must be uint8, or float in [0, 1], got {values.dtype}")
    image = Image.fromarray(values.contiguous().numpy())
    _check_size(image, "the image")
    return image


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
