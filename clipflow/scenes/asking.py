"""Questions about a scene, their answers, and scenes that make the answers balanced."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clipflow.scenes.captions import NUMBERS, caption, plural, same_description, with_article
from clipflow.scenes.world import (
    BACKGROUND_NAMES,
    COLOR_NAMES,
    GRID,
    LOOKS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    Dice,
    Look,
    Rng,
    Scene,
    is_held_out,
    place_objects,
    random_background,
    random_looks,
    random_scene,
    stands,
)

Asked = tuple[str, str]  # (question, answer)

CLEAR_BY = 10  # px by which one axis must dominate where a relation is asked


def _color(dice: Dice, scene: Scene) -> Asked | None:
    shapes = [o.shape for o in scene.objects]
    alone = [o for o in scene.objects if shapes.count(o.shape) == 1]
    if not alone:
        return None
    target = dice.choice(alone)
    word = "color" if dice.chance(0.5) else "colour"
    return f"what {word} is the {target.shape}?", target.color


def _shape(dice: Dice, scene: Scene) -> Asked | None:
    colors = [o.color for o in scene.objects]
    alone = [o for o in scene.objects if colors.count(o.color) == 1]
    if not alone:
        return None
    target = dice.choice(alone)
    return f"what shape is {target.color}?", target.shape


def _count(dice: Dice, scene: Scene) -> Asked | None:
    shapes = [o.shape for o in scene.objects]
    shape = dice.choice(sorted(set(shapes)))
    return f"how many {plural(shape)} are there?", NUMBERS[shapes.count(shape)]


def _exists(dice: Dice, scene: Scene) -> Asked | None:
    looks = [o.look for o in scene.objects]
    if dice.chance(0.5):
        look, answer = dice.choice(looks), "yes"
    else:
        look, answer = _absent_look(dice, looks), "no"
    return f"is there {with_article(' '.join(look))}?", answer


def _absent_look(dice: Dice, looks: list[Look]) -> Look:
    """A look that is not there; two times in three it shares its color or shape with one that is.

    With several objects this includes the color of one with the shape of another.
    """
    near = dice.chance(2 / 3)
    while True:
        color, shape = dice.choice(LOOKS)
        if near and dice.chance(0.5):
            color = dice.choice(looks)[0]
        elif near:
            shape = dice.choice(looks)[1]
        if (color, shape) not in looks:
            return color, shape


def _relation(dice: Dice, scene: Scene) -> tuple[str, str, str] | None:
    """(shape, relation, shape) of two objects that stand so clearly, each alone of its shape."""
    shapes = [o.shape for o in scene.objects]
    alone = [o for o in scene.objects if shapes.count(o.shape) == 1]
    pairs = [
        (first.shape, relation, second.shape)
        for first in alone
        for second in alone
        for relation in RELATIONS
        if first is not second and stands(first, relation, second, CLEAR_BY)
    ]
    return dice.choice(pairs) if pairs else None


def _position(dice: Dice, scene: Scene) -> Asked | None:
    found = _relation(dice, scene)
    if found is None:
        return None
    first, relation, second = found
    answer = "yes" if dice.chance(0.5) else "no"
    if answer == "no":
        relation = dice.choice([other for other in RELATIONS if other != relation])
    return f"is the {first} {relation} the {second}?", answer


def _background(dice: Dice, scene: Scene) -> Asked | None:
    return "what is the background?", scene.background


def _describe(dice: Dice, scene: Scene) -> Asked | None:
    return "describe the picture.", caption(scene)


_ASKERS: dict[str, Callable[[Dice, Scene], Asked | None]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "exists": _exists,
    "position": _position,
    "background": _background,
    "describe": _describe,
}
QUESTION_KINDS = tuple(_ASKERS)


def sample_question(rng: Rng, scene: Scene, kind: str) -> Asked | None:
    """A question of that kind and its answer, or None where the scene allows none."""
    if kind not in _ASKERS:
        raise ValueError(
            f"sample_question: kind must be one of {', '.join(QUESTION_KINDS)}, got {kind!r}"
        )
    return _ASKERS[kind](Dice.of(rng), scene)


def sample_relation(rng: Rng, scene: Scene) -> Asked | None:
    """A lesson for training: two objects, answered by how they stand, "left of".

    Yes or no about a relation depends on the word and on the picture only together, and is learned
    late; the relation itself can be told from where either object is.
    """
    found = _relation(Dice.of(rng), scene)
    return found and (f"describe the {found[0]} with the {found[2]}.", found[1])


def questions(scene: Scene, rng: Rng) -> list[Asked]:
    """One question of every kind that the scene allows, with its answer."""
    dice = Dice.of(rng)
    asked = (ask(dice, scene) for ask in _ASKERS.values())
    return [pair for pair in asked if pair is not None]


def _scene_to_count(dice: Dice, training: bool) -> tuple[Scene, Asked]:
    """One to four (evenly) of one shape among others; the objects' colors differ or agree."""
    shape, wanted = dice.choice(SHAPES), 1 + dice.below(MAX_OBJECTS)
    others = dice.below(MAX_OBJECTS - wanted + 1)
    color = dice.choice(COLOR_NAMES) if dice.chance(0.5) else None
    while True:
        looks = [(color or dice.choice(COLOR_NAMES), shape) for _ in range(wanted)]
        looks += random_looks(dice, others, training=training)
        mixed = any(other == shape for _, other in looks[wanted:])
        if not mixed and not (training and is_held_out(looks)):
            break
    cells = dice.sample(range(GRID**2), len(looks))
    scene = place_objects(dice, looks, cells, random_background(dice))
    return scene, (f"how many {plural(shape)} are there?", NUMBERS[wanted])


def _scene_to_ask(dice: Dice, kind: str, training: bool) -> Scene:
    if kind == "background":
        return random_scene(dice, background=dice.choice(BACKGROUND_NAMES), training=training)
    if kind == "describe":  # GenEval form: some of one look, or two objects
        identical = dice.chance(0.5)
        count = None if identical else 2
        return random_scene(dice, count=count, identical=identical, training=training)
    if kind == "position":
        count = 2 + dice.below(MAX_OBJECTS - 1)
        return random_scene(dice, count=count, distinct_shapes=True, training=training)
    return random_scene(dice, distinct_shapes=kind == "color", training=training)


def sample_asked_scene(
    rng: Rng, kind: str | None = None, *, training: bool = True
) -> tuple[Scene, str, str]:
    """Draw (scene, question, answer) so that every answer to a kind comes about equally often.

    No held-out pair in training. `kind` is one of `QUESTION_KINDS`; any if None.
    """
    dice = Dice.of(rng)
    kind = kind or dice.choice(QUESTION_KINDS)
    if kind == "count":
        scene, asked = _scene_to_count(dice, training)
        return scene, *asked
    while True:
        scene = _scene_to_ask(dice, kind, training)
        asked = sample_question(dice, scene, kind)
        if asked is not None:
            return scene, *asked


def check_answer(question: str, answer: str, given: str) -> bool:
    """Whether the given answer is the right one; letter case, spaces and a final stop are ignored.

    A description is right if it names the same groups of objects, in any order.
    """
    given = " ".join(given.lower().split()).rstrip(" .")
    if question.startswith("describe"):
        return same_description(answer, given)
    return given == answer


def evaluation_questions(count: int, seed: int) -> list[tuple[str, Scene, str, str]]:
    """(kind, scene, question, answer) to score a model with, kinds in turn.

    Scenes are drawn without the hold-out rule: held-out pairs come up as often as others.
    """
    rng = np.random.default_rng([seed, 200])
    kinds = [QUESTION_KINDS[i % len(QUESTION_KINDS)] for i in range(count)]
    return [(kind, *sample_asked_scene(rng, kind, training=False)) for kind in kinds]
