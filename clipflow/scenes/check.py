"""Does a picture, as the detector reads it, show what a prompt says?"""

from __future__ import annotations

from itertools import permutations

from clipflow.scenes.prompts import Prompt
from clipflow.scenes.world import Scene, stands


def check_prompt(prompt: Prompt, detected: Scene) -> bool:
    """Whether the scene has the prompt's objects, nothing else, placed and backed as it says."""
    if len(detected.objects) != len(prompt.wanted):
        return False
    if prompt.background is not None and detected.background != prompt.background:
        return False
    return any(
        all(
            found.shape == shape and color in (None, found.color)
            for found, (color, shape) in zip(order, prompt.wanted, strict=True)
        )
        and (prompt.relation is None or stands(order[0], prompt.relation, order[1]))
        for order in permutations(detected.objects)
    )
