"""Pictures for Qwen2.5-VL against a restatement of its rules, and the file that sets them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from clipflow.errors import InputError
from clipflow.pipelines.qwen_pictures import QwenImageProcessor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONFIG = SimpleNamespace(
    image_size=56,
    image_mean=MEAN,
    image_std=STD,
    vision=SimpleNamespace(
        patch_size=14, temporal_patch_size=2, spatial_merge_size=2, feature_pixels=28
    ),
    text=SimpleNamespace(max_position_embeddings=128000),
)
OWN = QwenImageProcessor.from_config(CONFIG)
# Width and height; a side of 3 could be taken for the colors of an array.
SIZES = [(56, 56), (3, 50), (50, 3), (1, 1), (100, 61), (4, 700), (199, 1), (333, 87), (28, 84)]


def noise(width, height):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def sides(width, height, least, most, step=28):
    """Whole steps nearest to the sides, or rounded to within the area."""
    found = [round(side / step) * step for side in (width, height)]
    area = width * height
    if math.prod(found) > most:
        shrink = math.sqrt(area / most)
        return [max(step, math.floor(side / shrink / step) * step) for side in (width, height)]
    if math.prod(found) < least:
        grow = math.sqrt(least / area)
        return [math.ceil(side * grow / step) * step for side in (width, height)]
    return found


def patches(image, width, height):
    """One token after the other, its four patches row by row, each color, frame, row, column."""
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    pixels = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    rows = []
    for top in range(0, height, 28):
        for left in range(0, width, 28):
            for y, x in ((0, 0), (0, 14), (14, 0), (14, 14)):
                patch = pixels[top + y : top + y + 14, left + x : left + x + 14]
                rows.append(np.stack([patch.transpose(2, 0, 1)] * 2, axis=1).ravel())
    return torch.tensor(np.stack(rows))


@pytest.mark.parametrize("limits", [(3136, 12845056), (28 * 28 * 8, 28 * 28 * 20)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_are_those_of_the_rules(size, limits):
    processor = QwenImageProcessor(**vars(OWN) | dict(zip(LIMITS, limits, strict=True)))
    image = noise(*size)
    width, height = sides(*size, *limits)
    assert processor.grid(image) == (height // 28, width // 28)
    found, grid = processor.patches(image)
    assert found.dtype == torch.float32 and grid.tolist() == [[1, height // 14, width // 14]]
    torch.testing.assert_close(found.double(), patches(image, width, height), atol=1e-5, rtol=0)


LIMITS = ("min_pixels", "max_pixels")


def test_pictures_to_edit_are_squares():
    assert OWN([noise(100, 61)]).shape == (1, 3, 56, 56)


def test_a_picture_leaves_half_of_a_prompt_to_the_words():
    text = SimpleNamespace(max_position_embeddings=1000)
    found = QwenImageProcessor.from_config(SimpleNamespace(**vars(CONFIG) | {"text": text}))
    assert (found.min_pixels, found.max_pixels) == (3136, 500 * 784)


def test_a_strip_is_refused():
    with pytest.raises(InputError, match="at most 200 times as long as wide, got 201 x 1"):
        OWN.grid(noise(201, 1))


PUBLISHED = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": list(MEAN),
    "image_std": list(STD),
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def read(folder, values):
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return QwenImageProcessor.from_folder(folder, CONFIG)


def test_files_of_folders(tmp_path):
    assert QwenImageProcessor.from_folder(tmp_path, CONFIG) == OWN == read(tmp_path, PUBLISHED)
    limits = {"shortest_edge": 200704, "longest_edge": 1605632}
    new = {**PUBLISHED, "size": limits}
    del new["min_pixels"], new["max_pixels"]
    found = read(tmp_path, new)
    assert (found.min_pixels, found.max_pixels) == (200704, 1605632)
    (tmp_path / "preprocessor_config.json").write_text(found.to_json())
    assert QwenImageProcessor.from_folder(tmp_path, CONFIG) == found
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    image = noise(700, 300)
    inputs = theirs(images=[image], return_tensors="pt")
    pixels, grid = found.patches(image)
    assert torch.equal(inputs["image_grid_thw"], grid)
    assert torch.equal(inputs["pixel_values"], pixels)


BROKEN = [
    ([], "must be that of Qwen2.5-VL"),
    ({"size": 3}, "must be that of Qwen2.5-VL"),
    ({"image_mean": "a"}, "must be that of Qwen2.5-VL"),
    ({"min_pixels": 0}, "whole numbers from 1 on"),
    ({"min_pixels": 10, "max_pixels": 9}, "whole numbers from 1 on"),
    ({"max_pixels": "9"}, "whole numbers from 1 on"),
    ({"patch_size": 16}, "patch_size must be the model's, 14, got 16"),
    ({"image_std": [0, 1, 1]}, "image_std must be above 0"),
    ({"do_normalize": False}, "do_normalize must be true, got False"),
]


@pytest.mark.parametrize(("values", "message"), BROKEN, ids=[str(v) for v, _ in BROKEN])
def test_broken_files_are_refused_in_one_line(tmp_path, values, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, values)
    assert "\n" not in str(caught.value)
