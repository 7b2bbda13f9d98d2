"""Crops of the image processor: the square in the middle, before or after the resizing."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling
from unilip_fixture import TINY, fixture_config

from clipflow.errors import InputError
from clipflow.models.blip3o.eva import CLIP_MEAN, CLIP_STD
from clipflow.pipelines.image_processor import ImageProcessor


def processor(crop, size=28):
    return ImageProcessor(size=size, mean=CLIP_MEAN, std=CLIP_STD, crop=crop)


def picture(width, height):
    rows = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(rows)


def levels(image):
    return np.asarray(image)


@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [
        ((60, 40), (42, 28), (7, 0, 35, 28)),
        ((40, 61), (28, 42), (0, 7, 28, 35)),  # 42.7 is cut off
        ((41, 40), (28, 28), (0, 0, 28, 28)),
        ((31, 28), (31, 28), (2, 0, 30, 28)),  # 1.5 rounds to the even side
        ((14, 10), (39, 28), (6, 0, 34, 28)),  # 5.5 does
        ((28, 28), (28, 28), (0, 0, 28, 28)),
    ],
)
def test_shorter_side_then_the_middle(size, resized, box):
    image = picture(*size)
    expected = image.resize(resized, Resampling.BICUBIC).crop(box)
    assert np.array_equal(levels(processor("after").resize(image)), levels(expected))


@pytest.mark.parametrize(
    ("size", "box"),
    [((60, 40), (10, 0, 50, 40)), ((40, 61), (0, 10, 40, 50)), ((28, 28), (0, 0, 28, 28))],
)
def test_the_middle_then_resized(size, box):
    image = picture(*size)
    expected = image.crop(box).resize((28, 28), Resampling.BICUBIC)
    assert np.array_equal(levels(processor("before").resize(image)), levels(expected))


def test_squashed_without_a_crop():
    image = picture(60, 40)
    expected = image.resize((28, 28), Resampling.BICUBIC)
    assert np.array_equal(levels(processor("none").resize(image)), levels(expected))


@pytest.mark.parametrize("crop", ["none", "before", "after"])
@pytest.mark.parametrize("size", [(1, 1), (1, 200_000), (90_001, 3)])
def test_odd_pictures_make_squares(crop, size):
    """No picture is resized to more than 16 squares."""
    pixels = processor(crop)([Image.new("RGB", size, (255, 0, 128))])
    assert pixels.shape == (1, 3, 28, 28)
    color = torch.tensor([1.0, 0.0, 128 / 255])
    expected = (color - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels[0].mean((1, 2)), expected)


def test_another_crop_is_refused():
    with pytest.raises(InputError, match="crop must be one of none, before, after, got 'center'"):
        processor("center")


@pytest.mark.parametrize("crop", ["none", "before"])
def test_a_folder_keeps_the_crop(tmp_path, crop):
    config = fixture_config(TINY)
    kept = dataclasses.replace(ImageProcessor.from_config(config), crop=crop)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(kept.to_json())
    assert ("crop" in json.loads(file.read_text())) == (crop != "none")
    assert ImageProcessor.from_folder(tmp_path, config) == kept
    file.write_text(file.read_text().replace("before", "sideways"))
    if crop != "none":
        with pytest.raises(InputError, match="got 'sideways'"):
            ImageProcessor.from_folder(tmp_path, config)
