"""Parameter names of published UniLIP checkpoints, mapped to ours by one table of prefixes.

Ours are the reference's in-memory names without the leading "model." (specs section 5.1). Files
come with those names, or with the language model, the vision tower and its projector renamed by
transformers' reverse mapping, or with ours.
"""

from __future__ import annotations

from collections.abc import Iterable

LM_HEAD = "lm_head.weight"

# (prefix in the file, our prefix); the first row that fits is taken.
PREFIXES = (
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.", ""),
)
# Beginnings of our names of what some checkpoints hold besides the model: the tower that training
# compared with, the autoencoder of the first stage, and tables that are computed.
SKIPPED = (
    "gen_vision_tower.",
    "dcae.encoder.",
    "dcae.decoder.",
    "dit.patch_embed.pos_embed",
    "vision_tower.embeddings.position_ids",
)
SKIPPED_ENDS = (".rotary_emb.inv_freq",)


def own_name(name: str) -> str:
    """Our name of the parameter called `name` in a checkpoint."""
    for found, own in PREFIXES:
        if name.startswith(found):
            return own + name.removeprefix(found)
    return name


def map_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> name in the checkpoint, without those that `skipped_names` counts.

    Raises:
        ValueError: two names of the checkpoint mean the same parameter, or it is one of the first
            stage of training, which has an autoencoder in the pixel decoder's place.
    """
    mapped: dict[str, str] = {}
    for name in names:
        own = own_name(name)
        if own in mapped:
            raise ValueError(
                f"checkpoint: every parameter must be there once, got {mapped[own]!r} and {name!r}"
            )
        mapped[own] = name
    kept = {own: name for own, name in mapped.items() if _skipped_as(own) is None}
    is_first_stage = any(own.startswith("dcae.") for own in mapped)
    if is_first_stage and not any(own.startswith("vae_decoder.") for own in mapped):
        raise ValueError(
            "checkpoint: must hold the pixel decoder (vae_decoder), got one of the first stage of "
            "training (dcae), which cannot draw from CLIP features"
        )
    return kept


def skipped_names(names: Iterable[str]) -> dict[str, int]:
    """What a checkpoint holds besides the model, and in how many tensors: {"dcae.encoder": 12}."""
    counts: dict[str, int] = {}
    for name in names:
        part = _skipped_as(own_name(name))
        if part is not None:
            counts[part] = counts.get(part, 0) + 1
    return counts


def _skipped_as(own: str) -> str | None:
    for part in SKIPPED:
        if own.startswith(part):
            return part.rstrip(".")
    for end in SKIPPED_ENDS:
        if own.endswith(end):
            return end.lstrip(".")
    return None
