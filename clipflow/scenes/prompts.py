"""Prompts for generation: their eight kinds ("tags"), what each means, scenes that satisfy them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from clipflow.scenes.captions import (
    NUMBERS,
    PHOTO_PREFIX,
    counted,
    on_background,
    plural,
    with_article,
)
from clipflow.scenes.world import (
    BACKGROUND_NAMES,
    COLOR_NAMES,
    DEFAULT_BACKGROUND,
    GRID,
    LOOKS,
    RELATIONS,
    SHAPES,
    Dice,
    Look,
    Rng,
    Scene,
    is_held_out,
    place_objects,
)

TAGS = (
    "single_object",
    "colors",
    "counting",
    "two_object",
    "color_attr",
    "position",
    "background",
    "reasoning",
)
REASONING_FORMS = ("sum", "placed", "riddle", "as_many")

SHAPE_RIDDLES = {
    "triangle": "three corners",
    "square": "four corners",
    "circle": "no corners",
    "star": "five points",
    "ring": "a hole",
    "cross": "four arms",
}
COLOR_RIDDLES = {
    "green": "grass",
    "white": "snow",
    "red": "blood",
    "yellow": "a lemon",
    "blue": "the sea",
    "orange": "a carrot",
    "purple": "a grape",
    "pink": "a flamingo",
}
CORNERS = {"triangle": 3, "square": 4}
SUMS = tuple((a, b) for a in (1, 2, 3) for b in (1, 2, 3) if a + b <= 4)
PLACED = {
    "left of": "on its left",
    "right of": "on its right",
    "above": "above it",
    "below": "below it",
}

# One in so many evaluation prompts and edits names a held-out pair, so that both parts can be read.
UNSEEN_EVERY = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its meaning.

    `wanted` has one (color or None, shape) for each object of the picture; `relation` is that of
    the first to the second. `seen` is False where the two looks are a held-out pair.
    """

    tag: str
    text: str
    wanted: tuple[tuple[str | None, str], ...]
    relation: str | None = None
    background: str | None = None
    seen: bool = True
    form: str | None = None  # of a reasoning prompt


def _single_object(dice: Dice, seen: bool | None) -> Prompt:
    shape = dice.choice(SHAPES)
    return Prompt("single_object", with_article(shape), ((None, shape),))


def _colors(dice: Dice, seen: bool | None) -> Prompt:
    look = dice.choice(LOOKS)
    return Prompt("colors", with_article(" ".join(look)), (look,))


def _counting(dice: Dice, seen: bool | None) -> Prompt:
    count, look = 1 + dice.below(4), dice.choice(LOOKS)
    return Prompt("counting", counted(count, look), (look,) * count)


def _two_object(dice: Dice, seen: bool | None) -> Prompt:
    first, second = dice.sample(SHAPES, 2)
    text = f"{with_article(first)} and {with_article(second)}"
    return Prompt("two_object", text, ((None, first), (None, second)))


def _pair(dice: Dice, seen: bool | None) -> tuple[tuple[Look, Look], bool]:
    """Two different looks (of a seen, an unseen or any pair), and whether the pair is seen."""
    while True:
        pair = (dice.choice(LOOKS), dice.choice(LOOKS))
        if pair[0] != pair[1]:
            pair_seen = not is_held_out(pair)
            if seen is None or seen == pair_seen:
                return pair, pair_seen


def _phrases(pair: tuple[Look, Look]) -> tuple[str, str]:
    return with_article(" ".join(pair[0])), with_article(" ".join(pair[1]))


def _color_attr(dice: Dice, seen: bool | None) -> Prompt:
    pair, pair_seen = _pair(dice, seen)
    first, second = _phrases(pair)
    return Prompt("color_attr", f"{first} and {second}", pair, seen=pair_seen)


def _position(dice: Dice, seen: bool | None) -> Prompt:
    pair, pair_seen = _pair(dice, seen)
    first, second = _phrases(pair)
    relation = dice.choice(tuple(RELATIONS))
    return Prompt("position", f"{first} {relation} {second}", pair, relation, seen=pair_seen)


def _background(dice: Dice, seen: bool | None) -> Prompt:
    look, background = dice.choice(LOOKS), dice.choice(BACKGROUND_NAMES)
    text = with_article(" ".join(look)) + on_background(background)
    return Prompt("background", text, (look,), background=background)


def _reasoning(dice: Dice, seen: bool | None, form: str | None = None) -> Prompt:
    form = form or dice.choice(REASONING_FORMS)
    color, shape = look = dice.choice(LOOKS)
    if form == "sum":
        a, b = dice.choice(SUMS)
        text = f"{NUMBERS[a]} plus {NUMBERS[b]} {color} {plural(shape)}"
        return Prompt("reasoning", text, (look,) * (a + b), form=form)
    if form == "riddle":
        text = f"a shape with {SHAPE_RIDDLES[shape]} in the colour of {COLOR_RIDDLES[color]}"
        return Prompt("reasoning", text, (look,), form=form)
    if form == "as_many":
        like, count = dice.choice(tuple(CORNERS.items()))
        text = f"as many {color} {plural(shape)} as {with_article(like)} has corners"
        return Prompt("reasoning", text, (look,) * count, form=form)
    pair, pair_seen = _pair(dice, seen)
    first, second = _phrases(pair)
    relation = dice.choice(tuple(PLACED))
    text = f"{second} with {first} {PLACED[relation]}"
    return Prompt("reasoning", text, pair, relation, seen=pair_seen, form=form)


_MAKERS = {
    "single_object": _single_object,
    "colors": _colors,
    "counting": _counting,
    "two_object": _two_object,
    "color_attr": _color_attr,
    "position": _position,
    "background": _background,
    "reasoning": _reasoning,
}


def make_prompt(
    rng: Rng, tag: str, *, seen: bool | None = None, prefix: bool | None = None
) -> Prompt:
    """Draw a prompt.

    Args:
        rng: generator (or a Dice made from one).
        tag: one of `TAGS`.
        seen: where the prompt names two looks, draw them from the seen (True), the held-out
            (False) or all pairs (None).
        prefix: begin with "a photo of "; one time in two if None.
    """
    if tag not in _MAKERS:
        raise ValueError(f"make_prompt: tag must be one of {', '.join(TAGS)}, got {tag!r}")
    dice = Dice.of(rng)
    prefix = dice.chance(0.5) if prefix is None else prefix
    prompt = _MAKERS[tag](dice, seen)
    return replace(prompt, text=PHOTO_PREFIX + prompt.text) if prefix else prompt


def _cell_pairs(relation: str) -> tuple[tuple[int, int], ...]:
    step_x, step_y = RELATIONS[relation]
    cells = [(first, second) for first in range(GRID**2) for second in range(GRID**2)]
    pairs = []
    for first, second in cells:
        dy, dx = first // GRID - second // GRID, first % GRID - second % GRID
        along, across = (dx * step_x, abs(dy)) if step_x else (dy * step_y, abs(dx))
        if along > across:
            pairs.append((first, second))
    return tuple(pairs)


_CELL_PAIRS = {relation: _cell_pairs(relation) for relation in RELATIONS}
_CELLS = range(GRID**2)


def draw_scene(rng: Rng, prompt: Prompt, *, training: bool = True) -> Scene:
    """Draw a scene of which the prompt is true, gray where it names no background.

    In training, colors that the prompt leaves open are drawn so that no held-out pair comes up.
    """
    dice = Dice.of(rng)
    while True:
        looks = [(color or dice.choice(COLOR_NAMES), shape) for color, shape in prompt.wanted]
        if not (training and prompt.seen and is_held_out(looks)):
            break
    if prompt.relation is None:
        cells = dice.sample(_CELLS, len(looks))
    else:
        cells = dice.choice(_CELL_PAIRS[prompt.relation])
    return place_objects(dice, looks, cells, prompt.background or DEFAULT_BACKGROUND)


def sample_prompted_scene(rng: Rng, tag: str, *, training: bool = True) -> tuple[str, Scene]:
    """Draw a prompt's text and a scene that satisfies it; no held-out pair in training."""
    dice = Dice.of(rng)
    prompt = make_prompt(dice, tag, seen=True if training else None)
    return prompt.text, draw_scene(dice, prompt, training=training)


def evaluation_prompts(tag: str, count: int, seed: int) -> list[Prompt]:
    """Prompts to score a model with, the same for the same arguments.

    Every fifth prompt that names a pair of looks names a held-out one (`seen` False).
    """
    rng = np.random.default_rng([seed, TAGS.index(tag)])
    return [make_prompt(rng, tag, seen=i % UNSEEN_EVERY != 0) for i in range(count)]


def plain_form(prompt: Prompt) -> str:
    """The prompt's meaning in the plainest words: "two plus one red stars" -> "three red stars"."""
    looks = [" ".join(filter(None, look)) for look in prompt.wanted]
    if len(looks) == 1:
        text = with_article(looks[0])
    elif len(set(looks)) == 1:
        color, shape = prompt.wanted[0]
        text = counted(len(looks), (color or "", shape))
    else:
        text = f" {prompt.relation or 'and'} ".join(map(with_article, looks))
    return text + (on_background(prompt.background) if prompt.background else "")
