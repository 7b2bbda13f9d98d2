"""Every word and sign of the scenes' language, for a word-level tokenizer."""

from __future__ import annotations

import re

from clipflow.scenes import captions, edits, prompts, world

_SENTENCES = (
    captions.PHOTO_PREFIX,
    "a an and , plus with in the colour color of shape has as many",
    *prompts.SHAPE_RIDDLES.values(),
    *prompts.COLOR_RIDDLES.values(),
    *prompts.PLACED.values(),
    *world.RELATIONS,
    "corners on background",
    "make the replace with remove add on change the background to",
    *edits.SIDES,
    "what colour is the? what shape is? how many are there? is there a? what is the background?",
    "describe the picture.",
    "yes no",
    # Frames of UniLIP's instructions, with and without a prompt, and the speakers of a chat.
    "generate an image: generate an image. edit the image: edit the image.",
    "user assistant system",
)


def split_words(text: str) -> list[str]:
    """Lower-case words and single punctuation signs, in order: "A star?" -> ["a", "star", "?"]."""
    return re.findall(r"[a-z]+|[^a-z\s]", text.lower())


def vocabulary() -> list[str]:
    """All words and signs that prompts, edits, questions, answers and captions use, sorted."""
    names = (*world.COLORS, *world.BACKGROUNDS, *captions.NUMBERS)
    shapes = [form for shape in world.SHAPES for form in (shape, captions.plural(shape))]
    words = {word for text in (*_SENTENCES, *names, *shapes) for word in split_words(text)}
    return sorted(words)
