"""Parameter names of published UniLIP checkpoints, mapped to ours by one table of prefixes.

Ours are the reference's in-memory names without the leading "model." (specs section 5.1). Files
come with those names, or with the language model, the vision tower and its projector renamed by
transformers' reverse mapping, or with ours.
"""

from __future__ import annotations

from collections.abc import Iterable

from clipflow.models.folders.names import NameTable

LM_HEAD = "lm_head.weight"

TABLE = NameTable(
    prefixes=(
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.", ""),
    ),
    # The tower that training compared with, the autoencoder of the first stage, and tables that
    # are computed.
    skipped=(
        "gen_vision_tower.",
        "dcae.encoder.",
        "dcae.decoder.",
        "dit.patch_embed.pos_embed",
        "vision_tower.embeddings.position_ids",
    ),
)
own_name, skipped_names = TABLE.own_name, TABLE.skipped_names


def map_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> name in the checkpoint, without those that `skipped_names` counts.

    Raises:
        ValueError: two names of the checkpoint mean the same parameter, or it is one of the first
            stage of training, which has an autoencoder in the pixel decoder's place.
    """
    mapped = TABLE.map_names(names)
    is_first_stage = any(own.startswith("dcae.") for own in mapped)
    if is_first_stage and not any(own.startswith("vae_decoder.") for own in mapped):
        raise ValueError(
            "checkpoint: must hold the pixel decoder (vae_decoder), got one of the first stage of "
            "training (dcae), which cannot draw from CLIP features"
        )
    return TABLE.kept(mapped)
