"""The detector reads drawn scenes back, also softened and tinted, and refuses what is no shape."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from clipflow.scenes import Scene, SceneObject, agrees, detect, random_scene, render, render_batch
from clipflow.scenes.detector import label_components


def scenes_and_pictures(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, training=False) for _ in range(count)]
    return scenes, render_batch(scenes, rng)


def soften(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A 0.7 px blur and a shift of 12/255 up or down on each channel."""
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7))
    shifted = np.asarray(blurred).astype(int) + rng.choice([-12, 12], size=3)
    return shifted.clip(0, 255).astype(np.uint8)


def test_reads_drawn_scenes_back():
    scenes, pictures = scenes_and_pictures(1000, 11)
    right = [agrees(*pair) for pair in zip(scenes, map(detect, pictures), strict=True)]
    assert np.mean(right) >= 0.995


def test_finds_centers_and_sizes_to_the_pixel():
    scenes, pictures = scenes_and_pictures(100, 14)
    for scene, picture in zip(scenes, pictures, strict=True):
        assert set(detect(picture).objects) == set(scene.objects)


def test_reads_softened_scenes_back():
    scenes, pictures = scenes_and_pictures(300, 12)
    rng = np.random.default_rng(13)
    read = [detect(soften(picture, rng)) for picture in pictures]
    assert np.mean([agrees(*pair) for pair in zip(scenes, read, strict=True)]) >= 0.97


@pytest.fixture
def red_circle() -> np.ndarray:
    scene = Scene("gray", (SceneObject("circle", "red", 4, (32, 32), 16),))
    return render(scene, np.random.default_rng(0))


def test_specks_are_ignored(red_circle):
    red_circle[5:8, 5:9] = (50, 90, 220)
    assert [o.look for o in detect(red_circle).objects] == [("red", "circle")]


def test_two_colors_are_not_one_object(red_circle):
    red_circle[24:40, 32:40] = (50, 90, 220)
    assert {o.color for o in detect(red_circle).objects} == {"red", "blue"}


def test_a_blot_has_no_shape(red_circle):
    red_circle[20:24, 10:60] = (220, 40, 40)
    assert {o.shape for o in detect(red_circle).objects} == {"unknown"}


@pytest.mark.parametrize("gray", [0, 128, 255])
def test_empty_pictures_show_no_shape(gray):
    picture = np.full((64, 64, 3), gray, dtype=np.uint8)
    assert all(o.shape == "unknown" for o in detect(picture).objects)


def test_noise_is_read_without_error():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert isinstance(detect(picture), Scene)


def test_bad_pictures_are_refused():
    with pytest.raises(ValueError, match=r"must be \[64, 64, 3\] uint8, got \[32, 32, 3\] uint8"):
        detect(np.zeros((32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"got .* float64"):
        detect(np.zeros((64, 64, 3)))


def test_components_touch_at_corners_and_may_be_bent():
    mask = np.array([[1, 0, 1, 0, 0], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
    labels, count = label_components(mask)
    assert count == 2
    assert len(set(labels[mask].tolist())) == 2 and (labels[~mask] == 0).all()
    assert labels[0, 0] == labels[0, 2] == labels[1, 4] != labels[3, 0]
    assert label_components(np.zeros((4, 4), bool))[1] == 0
