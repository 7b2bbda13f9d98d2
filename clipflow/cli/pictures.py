"""Where the pictures of a command go, and grids of pictures with captions."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipflow.errors import InputError
from clipflow.pipelines.image_io import check_writable, image_format_of, save_image

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

CELL = 128
CAPTION_LINES = 3
LINE = 13
GAP = 8
GRID_NAME = "grid.png"


@dataclass(frozen=True)
class Outputs:
    """File names of a command's pictures, checked before any work is done.

    Attributes:
        files: one for each picture; empty where only the grid is wanted.
        grid: the grid's file, or None.
        new_folder: to be made before writing, or None.
    """

    files: tuple[Path, ...]
    grid: Path | None
    new_folder: Path | None

    def write(self, images: Sequence[Image], captions: Sequence[str]) -> Iterator[Path]:
        """Write all pictures; yields each file once it is whole."""
        if self.new_folder is not None:
            make_folder(self.new_folder)
        for path, image in zip(self.files, images, strict=False):
            save_image(image, path)
            yield path
        if self.grid is not None:
            save_image(draw_grid(images, captions), self.grid)
            yield self.grid


def plan_outputs(target: str, captions: Sequence[str], *, grid: bool) -> Outputs:
    """Decide the file names of one picture for each of `captions`.

    Args:
        target: a file (one picture, or a grid), or a folder, which is made if it is missing.
        captions: what each picture shows; part of the names in a folder.
        grid: lay all pictures into one.

    Raises:
        InputError: many pictures for one file, an unknown file type, a place that is not writable.
    """
    path = Path(target)
    if path.is_dir() or target.endswith(("/", os.sep)) or not path.suffix:
        check_folder(path)
        names = [f"{index:03d}-{_slug(caption)}.png" for index, caption in enumerate(captions)]
        files = tuple(path / name for name in names)
        return Outputs(files, path / GRID_NAME if grid else None, path)
    image_format_of(path)
    check_writable(path)
    if grid:
        return Outputs((), path, None)
    if len(captions) > 1:
        raise InputError(
            f"-o must be a folder for {len(captions)} pictures (or add --grid), got {target}"
        )
    return Outputs((path,), None, None)


def plan_file(target: str) -> Path:
    """A single picture's file, checked before any work is done.

    Raises:
        InputError: an unknown file type, or a place that is not writable.
    """
    image_format_of(target)
    check_writable(target)
    return Path(target)


def check_folder(folder: Path) -> None:
    """Refuse, before any work is done, a folder that files could not be written into.

    Raises:
        InputError: it is a file, is not writable, or cannot be made.
    """
    existing = folder if folder.exists() else folder.absolute().parent
    if not existing.is_dir():
        raise InputError(f"{folder}: must be a folder in a folder that exists, got {existing}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written: {existing} is read-only")


def make_folder(folder: Path) -> None:
    """Make `folder`, in a folder that exists, unless it is there.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from error


def draw_grid(images: Sequence[Image], captions: Sequence[str], columns: int = 0) -> Image:
    """Lay pictures out in rows, each above its caption; small ones are enlarged."""
    from PIL import Image, ImageDraw, ImageFont

    columns = columns or min(len(images), max(2, round(len(images) ** 0.5)))
    rows = -(-len(images) // columns)
    height = CELL + CAPTION_LINES * LINE + GAP
    size = (GAP + columns * (CELL + GAP), GAP + rows * height)
    sheet = Image.new("RGB", size, (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = GAP + index % columns * (CELL + GAP)
        y = GAP + index // columns * height
        sheet.paste(_fit(image), (x, y))
        text = "\n".join(_wrapped(caption, lambda line: pen.textlength(line, font=font)))
        pen.multiline_text((x, y + CELL + 2), text, fill=(0, 0, 0), font=font, spacing=2)
    return sheet


def generators(seed: int | None, count: int) -> tuple[int, list[torch.Generator]]:
    """A generator for each of `count` pictures, and the first seed (drawn if it is None)."""
    import torch

    first = secrets.randbelow(2**31) if seed is None else seed
    return first, [torch.Generator().manual_seed(first + k) for k in range(count)]


def _fit(image: Image) -> Image:
    from PIL import Image as Pillow

    if max(image.size) <= CELL:  # enlarged by pixels, so that small pictures stay honest
        scale = max(1, CELL // max(image.size))
        large = image.resize((image.width * scale, image.height * scale), Pillow.Resampling.NEAREST)
    else:
        large = image.copy()
    large.thumbnail((CELL, CELL), Pillow.Resampling.LANCZOS)
    cell = Pillow.new("RGB", (CELL, CELL), (255, 255, 255))
    cell.paste(large, ((CELL - large.width) // 2, (CELL - large.height) // 2))
    return cell


def _wrapped(caption: str, width) -> list[str]:
    """Words of `caption` in at most CAPTION_LINES lines of the width of a cell."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width(longer) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:CAPTION_LINES]


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40] or "picture"
