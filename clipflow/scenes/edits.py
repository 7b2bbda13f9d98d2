"""Edits: a scene, an instruction in words, the scene that follows, and whether a result obeys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from clipflow.scenes.captions import with_article
from clipflow.scenes.prompts import UNSEEN_EVERY
from clipflow.scenes.world import (
    BACKGROUND_NAMES,
    COLOR_NAMES,
    LOOKS,
    MAX_OBJECTS,
    SHAPES,
    Dice,
    Rng,
    Scene,
    SceneObject,
    is_held_out,
    place,
    random_scene,
)

# Cells of the column or row that each side names.
SIDES = {
    "left": (0, 3, 6),
    "right": (2, 5, 8),
    "top": (0, 1, 2),
    "bottom": (6, 7, 8),
}
KEPT_WITHIN = 4  # px on each axis, for an object that should not have moved


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction between two scenes; `seen` is False where a scene has a held-out pair."""

    kind: str
    before: Scene
    instruction: str
    after: Scene
    seen: bool
    cells: tuple[int, ...] = ()  # where the new or changed object may stand


def _unique(dice: Dice, scene: Scene) -> SceneObject | None:
    """An object that is the only one of its shape, so that "the circle" names it."""
    shapes = [o.shape for o in scene.objects]
    alone = [o for o in scene.objects if shapes.count(o.shape) == 1]
    return dice.choice(alone) if alone else None


def _swap(scene: Scene, target: SceneObject, new: tuple[SceneObject, ...]) -> Scene:
    return Scene(scene.background, tuple(o for o in scene.objects if o is not target) + new)


def _recolor(dice: Dice, before: Scene) -> Edit | None:
    target = _unique(dice, before)
    if target is None:
        return None
    color = dice.choice([c for c in COLOR_NAMES if c != target.color])
    after = _swap(before, target, (replace(target, color=color),))
    text = f"make the {target.shape} {color}"
    return Edit("recolor", before, text, after, True, (target.cell,))


def _replace(dice: Dice, before: Scene) -> Edit | None:
    target = _unique(dice, before)
    if target is None:
        return None
    shape = dice.choice([s for s in SHAPES if s != target.shape])
    after = _swap(before, target, (replace(target, shape=shape),))
    text = f"replace the {target.shape} with {with_article(shape)}"
    return Edit("replace", before, text, after, True, (target.cell,))


def _remove(dice: Dice, before: Scene) -> Edit | None:
    target = _unique(dice, before)
    if target is None or len(before.objects) == 1:
        return None
    return Edit("remove", before, f"remove the {target.shape}", _swap(before, target, ()), True)


def _add(dice: Dice, before: Scene) -> Edit | None:
    side = dice.choice(tuple(SIDES))
    taken = {o.cell for o in before.objects}
    free = tuple(cell for cell in SIDES[side] if cell not in taken)
    if not free or len(before.objects) == MAX_OBJECTS:
        return None
    look = dice.choice(LOOKS)
    after = Scene(before.background, (*before.objects, place(dice, look, dice.choice(free))))
    text = f"add {with_article(' '.join(look))} on the {side}"
    return Edit("add", before, text, after, True, free)


def _background(dice: Dice, before: Scene) -> Edit | None:
    background = dice.choice([b for b in BACKGROUND_NAMES if b != before.background])
    after = replace(before, background=background)
    return Edit("background", before, f"change the background to {background}", after, True)


_MAKERS: dict[str, Callable[[Dice, Scene], Edit | None]] = {
    "recolor": _recolor,
    "replace": _replace,
    "remove": _remove,
    "add": _add,
    "background": _background,
}
EDIT_KINDS = tuple(_MAKERS)


def draw_edit(rng: Rng, kind: str | None = None, *, seen: bool | None = None) -> Edit:
    """Draw an edit.

    Args:
        rng: generator (or a Dice made from one).
        kind: one of `EDIT_KINDS`; any if None.
        seen: neither scene (True) or at least one of them (False) has a held-out pair; None: any.
    """
    if kind is not None and kind not in _MAKERS:
        raise ValueError(f"draw_edit: kind must be one of {', '.join(EDIT_KINDS)}, got {kind!r}")
    dice = Dice.of(rng)
    kind = kind or dice.choice(EDIT_KINDS)
    low, high = {"remove": (2, 4), "add": (1, 3)}.get(kind, (1, 4))
    while True:
        count = low + dice.below(high - low + 1)
        distinct = kind not in ("add", "background") and dice.chance(0.75)
        before = random_scene(dice, count=count, distinct_shapes=distinct, training=seen is True)
        edit = _MAKERS[kind](dice, before)
        if edit is None:
            continue
        edit_seen = not (is_held_out(before.objects) or is_held_out(edit.after.objects))
        if seen is None or seen == edit_seen:
            return edit if edit_seen else replace(edit, seen=False)


def sample_edit(rng: Rng, *, training: bool = True) -> tuple[Scene, str, Scene]:
    """Draw (scene before, instruction, scene after); no held-out pair in training."""
    edit = draw_edit(rng, seen=True if training else None)
    return edit.before, edit.instruction, edit.after


def _still_there(o: SceneObject, found: SceneObject) -> bool:
    shift = max(abs(o.center[0] - found.center[0]), abs(o.center[1] - found.center[1]))
    return o.look == found.look and shift <= KEPT_WITHIN


def check_edit(edit: Edit, detected: Scene) -> bool:
    """Whether a result shows the change asked for and nothing else.

    Every other object keeps shape, color and (within 4 px) center; nothing else appeared; the
    background is the one before, or the new one where that was the change.
    """
    if detected.background != edit.after.background:
        return False
    kept = [o for o in edit.after.objects if o in edit.before.objects]
    changed = [o for o in edit.after.objects if o not in edit.before.objects]
    rest = list(detected.objects)
    for o in kept:
        match = next((found for found in rest if _still_there(o, found)), None)
        if match is None:
            return False
        rest.remove(match)
    if len(rest) != len(changed):
        return False
    return all(
        found.look == o.look and found.cell in edit.cells
        for o, found in zip(changed, rest, strict=True)
    )


def evaluation_edits(count: int, seed: int) -> list[Edit]:
    """Edits to score a model with, kinds in turn, the same for the same arguments.

    Every fifth of a kind has a held-out pair before or after (`seen` False).
    """
    rng = np.random.default_rng([seed, 100])
    kinds = len(EDIT_KINDS)
    return [
        draw_edit(rng, EDIT_KINDS[i % kinds], seen=(i // kinds) % UNSEEN_EVERY != 0)
        for i in range(count)
    ]
