"""Reading odd pictures, refusing broken ones, writing whole files or none."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from clipflow.errors import InputError
from clipflow.pipelines.image_io import (
    MAX_PIXELS,
    check_writable,
    load_image,
    save_image,
    write_atomically,
)
from clipflow.pipelines.quality import psnr, ssim


def png_header(width, height):
    """The beginning of a PNG: its size, and then pixels that never come."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(chunk))
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + crc
        + struct.pack(">I", 999)
        + b"IDAT"
    )


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixel(image):
    return load_image(image).getpixel((0, 0))


def test_files_arrays_and_tensors_are_the_same_picture(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    array = np.asarray(photo)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for source in (
        tmp_path / "a.png", str(tmp_path / "a.png"), photo, array, tensor,
        tensor.float() / 255, array / 255,
    ):  # fmt: skip
        np.testing.assert_array_equal(np.asarray(load_image(source)), array)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert pixel(clear) == (255, 255, 255)
    assert pixel(half) == (255, 127, 127)
    assert pixel(Image.new("LA", (4, 4), (0, 0))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(palette) == (10, 20, 30)
    palette.info["transparency"] = 1
    assert pixel(palette) == (255, 255, 255)


def test_deep_gray_and_cmyk_become_eight_bit_rgb():
    deep = Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    assert pixel(deep) == (128, 128, 128)
    assert pixel(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32))) == (128, 128, 128)
    assert pixel(Image.fromarray(np.full((4, 4), 200.0, dtype=np.float32))) == (200, 200, 200)
    assert pixel(Image.new("CMYK", (4, 4), (0, 255, 255, 0))) == (255, 0, 0)
    assert pixel(Image.new("1", (4, 4), 1)) == (255, 255, 255)


def test_sixteen_bit_png_file(tmp_path):
    Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert pixel(tmp_path / "deep.png") == (255, 255, 255)


def test_exif_turn_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


def write_bad_files(folder):
    """Name -> what the complaint must say."""
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "huge.png").write_bytes(png_header(5200, 5000))
    (folder / "bomb.png").write_bytes(png_header(40000, 40000))
    (folder / "header.png").write_bytes(png_header(10, 10))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg"):
        Image.fromarray(noise).save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "folder.png").mkdir()
    return {
        "missing.png": "no such image file",
        "empty.png": "0 bytes",
        "text.png": "must be a picture",
        "huge.png": "at most 25 megapixels, got 26 megapixels",
        "bomb.png": "at most 25 megapixels",
        "header.png": "cannot be read",
        "cut.png": "cannot be read",
        "cut.jpg": "cannot be read",
        "folder.png": "got a folder",
    }


def test_broken_files_are_refused_with_their_name(tmp_path, recwarn):
    for name, message in write_bad_files(tmp_path).items():
        with pytest.raises(InputError, match=message) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not recwarn.list


def test_twenty_five_megapixels_are_allowed():
    assert MAX_PIXELS == 5000 * 5000
    assert load_image(Image.new("1", (5000, 5000))).size == (5000, 5000)


@pytest.mark.parametrize(
    "source",
    [3, None, np.zeros((4, 4)), np.zeros((4, 4, 3), dtype=np.int64), torch.zeros(4, 4, 4)],
    ids=["int", "none", "2d", "int64", "4-channels"],
)
def test_other_things_are_no_pictures(source):
    with pytest.raises(InputError, match="image must be"):
        load_image(source)


def test_save_takes_the_format_of_the_suffix(photo, tmp_path):
    for name, image_format in (("a.png", "PNG"), ("b.JPG", "JPEG"), ("c.webp", "WEBP")):
        save_image(photo, tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.format == image_format
    with pytest.raises(InputError, match=r"must end in .png"):
        save_image(photo, tmp_path / "a.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.JPG", "c.webp"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("old")

    def half(file):
        file.write(b"new")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_atomically(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_unwritable_places_are_refused(photo, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "a.png", tmp_path / "file" / "a.png", tmp_path):
        with pytest.raises(InputError):
            check_writable(path)
    with pytest.raises(InputError, match="cannot be written"):
        save_image(photo, tmp_path / "no" / "a.png")


def test_psnr_and_ssim(photo):
    assert psnr(photo, photo) == float("inf") and ssim(photo, photo) == pytest.approx(1)
    gray, lighter = (Image.new("RGB", (16, 16), (v, v, v)) for v in (100, 110))
    assert psnr(gray, lighter) == pytest.approx(20 * np.log10(255 / 10))
    x, y = 100 / 255, 110 / 255
    assert ssim(gray, lighter) == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4))
    turned = photo.transpose(Image.Transpose.ROTATE_180)
    assert ssim(photo, turned) < 0.3
