"""The drawn world: boxes, centers, colors and noise are as the scenes' text says."""

import numpy as np
import pytest

from clipflow.scenes import Scene, SceneObject, is_held_out, random_scene, render, render_batch
from clipflow.scenes.renderer import coverage
from clipflow.scenes.world import BACKGROUNDS, COLORS, LOOKS, SHAPES


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_size_is_larger_side_of_box_around_center(shape):
    """Drawn ten times as large: at 16 px the tips of a star are thinner than a sample."""
    alpha = coverage(shape, 160, 100) > 0
    x, y = np.nonzero(alpha.any(axis=0))[0], np.nonzero(alpha.any(axis=1))[0]
    left, top, right, bottom = x[0], y[0], x[-1] + 1, y[-1] + 1
    assert max(right - left, bottom - top) == pytest.approx(160, abs=2)
    assert (left + right) / 2 == pytest.approx(100, abs=1)
    assert (top + bottom) / 2 == pytest.approx(100, abs=1)


@pytest.mark.parametrize(
    ("shape", "share"),  # area of the shape, of its larger side squared
    [
        ("circle", np.pi / 4),
        ("square", 1.0),
        ("triangle", np.sqrt(3) / 4),
        ("star", 5 * 0.382 * np.sin(np.pi / 5) / (2 * np.sin(2 * np.pi / 5)) ** 2),
        ("cross", 5 / 9),
        ("ring", np.pi / 4 * (1 - 0.55**2)),
    ],
)
def test_areas(shape, share):
    assert coverage(shape, 16).sum() == pytest.approx(share * 16**2, rel=0.03)


def test_apexes_point_up():
    for shape in ("triangle", "star"):
        alpha = coverage(shape, 16)
        assert alpha[:5].sum() < alpha[8:].sum()


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("color", COLORS)
def test_colors_and_noise(background, color):
    scene = Scene(background, (SceneObject("square", color, 4, (32, 32), 16),))
    image = render(scene, rng()).astype(int)
    assert (image[24:40, 24:40] == COLORS[color]).all()
    noise = image[:20] - np.array(BACKGROUNDS[background])
    assert 2 <= np.abs(noise).max() <= 4
    assert np.abs(np.diff(noise, axis=0)).max() <= 2, "the noise is smooth"


def test_batch_equals_one_by_one_and_is_deterministic():
    draw = rng(1)
    scenes = [random_scene(draw) for _ in range(70)]
    one, other = rng(2), rng(2)
    batch = render_batch(scenes, one)
    assert batch.shape == (70, 64, 64, 3) and batch.dtype == np.uint8
    assert (batch == np.stack([render(scene, other) for scene in scenes])).all()
    assert render_batch([], rng()).shape == (0, 64, 64, 3)


def test_objects_stand_apart_and_inside():
    draw = rng(3)
    for _ in range(500):
        scene = random_scene(draw, training=False)
        taken = np.zeros((64, 64), dtype=int)
        for o in scene.objects:
            (x, y), half = o.center, -(-o.size // 2)
            assert half <= min(x, y) and max(x, y) + half <= 64
            taken[y - half : y + half + 2, x - half : x + half + 2] += 1
        assert taken.max() <= 1


def test_random_scene_controls():
    draw = rng(4)
    for _ in range(200):
        scene = random_scene(draw, count=3, background="sky", distinct_shapes=True)
        assert scene.background == "sky" and len({o.shape for o in scene.objects}) == 3
        assert len({o.cell for o in scene.objects}) == 3
        assert len({o.look for o in random_scene(draw, identical=True).objects}) == 1
    with pytest.raises(ValueError, match="count must be 1 to 4, got 5"):
        random_scene(draw, count=5)
    with pytest.raises(ValueError, match=r"background must be one of gray.*got 'pink'"):
        random_scene(draw, background="pink")


def test_hold_out_is_a_tenth_of_the_pairs():
    held_out = [is_held_out([a, b]) for i, a in enumerate(LOOKS) for b in LOOKS[:i]]
    assert 0.07 < np.mean(held_out) < 0.13
    assert not any(is_held_out([look, look]) for look in LOOKS)
    a, b = next((a, b) for a in LOOKS for b in LOOKS if is_held_out([a, b]))
    assert is_held_out([b, a]) and is_held_out([a, a, b])
