"""Parameter names of published BLIP3-o checkpoints, mapped to ours by one table of prefixes.

Files come with the names of transformers up to 4.51, of later versions, or with ours (specs section
A.10).
"""

from __future__ import annotations

from collections.abc import Iterable

from clipflow.models.blip3o.eva_keys import eva_names
from clipflow.models.folders.names import NameTable

TARGET = "clip_target."
TABLE = NameTable(
    prefixes=(
        ("model.dit.model.", "dit."),
        ("model.latent_queries", "latent_queries"),
        ("model.gen_vision_tower.", "gen_vision_tower."),
        ("model.visual.", "visual."),
        ("model.language_model.", "language_model."),
        ("model.", "language_model."),
    ),
    # The tower whose features training draws.
    skipped=("gen_vision_tower.",),
)
skipped_names = TABLE.skipped_names


def map_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> name in the checkpoint, without those that `skipped_names` counts.

    Raises:
        ValueError: two names of the checkpoint mean the same parameter, or nothing in it draws.
    """
    kept = TABLE.kept(TABLE.map_names(names))
    if not any(own.startswith("dit.") for own in kept):
        raise ValueError(
            "checkpoint: must hold the diffusion transformer (model.dit.model.*), got none: is it "
            "a Qwen2.5-VL?"
        )
    return kept


def map_names_with_target(names: Iterable[str]) -> dict[str, str]:
    """The same, with the EVA-CLIP tower that a published checkpoint holds.

    Raises:
        ValueError: as `map_names`, or it holds no tower.
    """
    names = list(names)
    kept = map_names(names)
    kept |= {TARGET + own: name for own, name in eva_names(names).items()}
    if not any(own.startswith(TARGET) for own in kept):
        raise ValueError(
            "checkpoint: must hold the EVA-CLIP tower (model.gen_vision_tower.*), got none"
        )
    return kept
