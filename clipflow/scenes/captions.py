"""Noun phrases and captions: how a scene is put into words."""

from __future__ import annotations

import re
from collections import Counter

from clipflow.scenes.world import BACKGROUNDS, DEFAULT_BACKGROUND, LOOKS, Look, Scene

NUMBERS = ("zero", "one", "two", "three", "four")
PHOTO_PREFIX = "a photo of "


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def with_article(phrase: str) -> str:
    """ "red star" -> "a red star"."""
    return f"{article(phrase)} {phrase}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def counted(count: int, look: Look) -> str:
    """ "one red star", "three red stars"."""
    color, shape = look
    return f"{NUMBERS[count]} {color} {shape if count == 1 else plural(shape)}"


def on_background(background: str) -> str:
    return f" on {with_article(f'{background} background')}"


def caption(scene: Scene) -> str:
    """Describe a scene: "a red circle and two blue squares on a sand background".

    Objects of one look are counted together; the groups come in reading order (top row first, from
    left to right) of their first objects; the default background is not named.
    """
    groups = Counter(o.look for o in sorted(scene.objects, key=lambda o: o.cell))
    phrases = [
        with_article(" ".join(look)) if count == 1 else counted(count, look)
        for look, count in groups.items()
    ]
    text = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    return text + (
        "" if scene.background == DEFAULT_BACKGROUND else on_background(scene.background)
    )


def same_description(first: str, second: str) -> bool:
    """Whether two captions say the same, whatever the order of their groups."""
    return _described(first) == _described(second)


def _described(text: str) -> tuple[list[str], str]:
    text = " ".join(text.lower().split()).removeprefix(PHOTO_PREFIX)
    groups, _, background = text.partition(" on ")
    background = background.removesuffix(" background").split(" ")[-1]
    if background not in BACKGROUNDS and background:
        background = "unknown"
    return sorted(re.split(r" and | ?, ?", groups)), background or DEFAULT_BACKGROUND


def labels() -> list[str]:
    """The 48 labels of zero-shot classification, "a red circle" ... "a white ring"."""
    return [with_article(" ".join(look)) for look in LOOKS]
