"""Parameter names of published BLIP3o-NEXT checkpoints, mapped to ours by one table of prefixes.

Source: specs of BLIP3o-NEXT section B.5. SANA and its autoencoder may also come from diffusers'
own folders, whose names have no prefix.
"""

from __future__ import annotations

from collections.abc import Iterable

from clipflow.models.folders.names import NameTable

DIT, DECODER = "dit.", "vae.decoder."
SANA_FOLDER = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
TABLE = NameTable(
    prefixes=(
        ("model.diffusion_connector.", "diffusion_connector."),
        ("model.sana.", DIT),
        ("model.sana_vae.", "vae."),
        ("model.vision_tower.", "vision_tower."),
        ("model.language_model.", "language_model."),
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.", "language_model."),
        # diffusers' folders of the transformer and of the autoencoder
        *((name, DIT + name) for name in (
            "patch_embed.", "time_embed.", "caption_projection.", "caption_norm.",
            "transformer_blocks.", "scale_shift_table", "proj_out.",
        )),
        ("decoder.", DECODER),
        ("encoder.", "vae.encoder."),
    ),
    # TA-Tok, which drawing has no use for, the autoencoder's other half, and tables that are
    # computed.
    skipped=("vision_tower.", "vae.encoder.", "dit.patch_embed.pos_embed"),
)  # fmt: skip
own_name, skipped_names = TABLE.own_name, TABLE.skipped_names


def map_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> name in the checkpoint, without those that `skipped_names` counts.

    Raises:
        ValueError: two names of the checkpoint mean the same parameter, or it has no SANA
            transformer or no pixel decoder.
    """
    kept = TABLE.kept(TABLE.map_names(names))
    missing = missing_parts(kept)
    if missing:
        raise ValueError(
            f"checkpoint: must hold {' and '.join(missing)}, or config.json must name a local "
            f"folder of them as diffusion_name_or_path (they are those of {SANA_FOLDER}), got none"
        )
    return kept


def missing_parts(names: Iterable[str]) -> list[str]:
    """Which of SANA's parts no parameter of `names`, ours, belongs to; what they are called."""
    names = tuple(names)
    parts = {DIT: "the SANA transformer (model.sana.*)", DECODER: "its decoder (model.sana_vae.*)"}
    return [called for part, called in parts.items() if not any(n.startswith(part) for n in names)]
