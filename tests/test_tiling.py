"""Dynamic tiling against transformers' processor of the same scheme, and its tiles by hand."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_chat import TILE, tiny_chat
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from clipflow.pipelines.image_processor import ImageProcessor
from clipflow.pipelines.tiling import TileSet, cut_tiles, tile_grid

SIZE = 448


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def theirs(width, height, most, size=SIZE):
    return get_optimal_tiled_canvas.__wrapped__((height, width), (size, size), 1, most)


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), most=st.integers(1, 13))
def test_the_grid_is_theirs(width, height, most):
    found = tile_grid(width, height, size=SIZE, max_tiles=most)
    assert found == theirs(width, height, most)
    assert found[0] * found[1] <= most


def test_the_grid_is_theirs_at_ties():
    """Sizes of the grids' own ratios, halfway between them, and at the border of the area rule."""
    dice = random.Random(0)
    sizes = [(SIZE * i, SIZE * j) for i in range(1, 13) for j in range(1, 13)]
    sizes += [(i, j) for i in range(1, 40) for j in range(1, 40)]
    sizes += [(i * 224, j * 224) for i in range(1, 25) for j in range(1, 25)]
    sizes += [(i * 2 * s, j * 2 * s) for i, j in sizes[:40] for s in (1, dice.randint(2, 5))]
    for width, height in sizes:
        found = tile_grid(width, height, size=SIZE, max_tiles=12)
        assert found == theirs(width, height, 12), (width, height)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((634, 634), (2, 2)),  # more than half of four tiles
        ((633, 633), (1, 1)),
        ((896, 448), (2, 1)),
        ((100, 5000), (1, 12)),
        ((5000, 100), (12, 1)),
        ((1344, 1000), (4, 3)),
        ((2000, 2000), (3, 3)),
    ],
)
def test_grids_by_hand(size, grid):
    assert tile_grid(*size, size=SIZE, max_tiles=12) == grid


@pytest.mark.parametrize("most", [1, 2, 5, 12])
@pytest.mark.parametrize("size", [(56, 56), (30, 40), (300, 100), (90, 250), (170, 113), (1, 700)])
def test_tiles_are_theirs(size, most):
    image = noise(*size)
    processor = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        max_patches=most,
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
    )
    inputs = processor(image, return_tensors="pt")
    tiles = cut_tiles(image, size=TILE, max_tiles=most)
    assert inputs["num_patches"].tolist() == [len(tiles)]
    ours = ImageProcessor(size=TILE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))(tiles)
    torch.testing.assert_close(ours, inputs["pixel_values"].float(), atol=1e-5, rtol=0)


def test_tiles_go_row_by_row_and_the_whole_comes_last():
    colors = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(np.repeat(np.repeat(colors, 64, 0), 64, 1)).convert("RGB")
    tiles = cut_tiles(image, size=64, max_tiles=6)
    assert [tile.getpixel((32, 32))[0] for tile in tiles[:6]] == [0, 40, 80, 120, 160, 200]
    assert len(tiles) == 7 and tiles[6].tobytes() == image.resize((64, 64), 3).tobytes()


def test_one_tile_is_what_the_image_processor_sees():
    image = noise(130, 70)
    processor = ImageProcessor(size=TILE, mean=(0.5,) * 3, std=(0.25,) * 3)
    (tile,) = cut_tiles(image, size=TILE, max_tiles=1, resample=processor.resample)
    assert torch.equal(processor([tile]), processor([image]))


def test_equal_tiles_are_kept_once(tmp_path):
    image, other = noise(112, 56), noise(40, 40)
    image.save(tmp_path / "again.png")
    tiles = TileSet(ImageProcessor(size=TILE, mean=(0.5,) * 3, std=(0.25,) * 3), 12)
    assert tiles.add([image, other]) == [3, 1]
    assert tiles.add([str(tmp_path / "again.png"), image]) == [3, 3]
    assert len(tiles.pictures) == 4
    assert tiles.places == [[0, 1, 2], [3], [0, 1, 2], [0, 1, 2]]
    blank = Image.new("RGB", (224, 112))
    assert tiles.add([blank]) == [9] and len(tiles.pictures) == 5


def asked(*images):
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": "what?"}]}]


@pytest.fixture
def pipe():
    return tiny_chat()


@pytest.fixture
def seen(pipe, monkeypatch):
    """How many tiles each pass through the vision tower had."""
    counts, encode = [], pipe.model.encode_image
    monkeypatch.setattr(
        pipe.model, "encode_image", lambda pixels: counts.append(len(pixels)) or encode(pixels)
    )
    return counts


def test_the_vision_tower_sees_each_tile_once_and_some_at_a_time(pipe, seen, monkeypatch):
    image = noise(200, 60)
    wanted = pipe.chat(asked(image), max_new_tokens=4)
    assert seen == [len(cut_tiles(image, size=TILE, max_tiles=12))] == [4]
    pipe.feature_cache.clear()
    monkeypatch.setattr("clipflow.pipelines.tiling.PIXELS_AT_ONCE", 3 * TILE**2 + 1)
    batch = [asked(image), asked(image, image), asked(image)]
    answers = pipe.chat(batch, max_new_tokens=4)
    assert seen[1:] == [3, 1] and answers[0] == answers[2] == wanted


def test_features_are_kept_until_the_weights_change(pipe, seen):
    image, other = noise(60, 60), noise(60, 60, seed=1)
    first = pipe.ask(image, "what?", max_new_tokens=4)
    assert pipe.ask(image.copy(), "what?", max_new_tokens=4) == first and seen == [1]
    pipe.classify([image, other], ["a", "b"])
    assert seen == [1, 1]
    statistics = pipe.feature_cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.entries) == (2, 2, 2)
    assert statistics.bytes == 2 * 4 * pipe.model.config.text.hidden_size * 4
    processor = pipe.image_processor
    pipe.image_processor = dataclasses.replace(processor, mean=(0.1, 0.2, 0.3))
    pipe.ask(image, "what?", max_new_tokens=4)
    pipe.image_processor = processor
    assert seen == [1, 1, 1]
    with torch.no_grad():
        pipe.model.multi_modal_projector[3].bias.add_(1)
    pipe.ask(image, "what?", max_new_tokens=4)
    assert seen == [1, 1, 1, 1] and pipe.feature_cache.statistics().entries == 1
    with torch.autocast("cpu", torch.bfloat16):
        pipe.ask(image, "what?", max_new_tokens=1)
    assert len(seen) == 5
    pipe.to(torch.bfloat16).ask(image, "what?", max_new_tokens=4)
    assert len(seen) == 6
    pipe.feature_cache.max_bytes = 0
    pipe.ask(image, "what?", max_new_tokens=1)
    pipe.ask(image, "what?", max_new_tokens=1)
    assert len(seen) == 8
