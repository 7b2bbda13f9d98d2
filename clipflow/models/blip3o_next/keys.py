"""Parameter names of published BLIP3o-NEXT checkpoints, mapped to ours by one table of prefixes.

Source: specs of BLIP3o-NEXT section B.5. SANA and its autoencoder may also come from diffusers'
own folders, whose names have no prefix.
"""

from __future__ import annotations

from collections.abc import Iterable

DIT, DECODER = "dit.", "vae.decoder."
SANA_FOLDER = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
# (prefix in the file, our prefix); the first row that fits is taken.
PREFIXES = (
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
)  # fmt: skip
# Beginnings of our names of what checkpoints hold besides: TA-Tok, which drawing has no use for,
# the autoencoder's other half, and tables that are computed.
SKIPPED = ("vision_tower.", "vae.encoder.", "dit.patch_embed.pos_embed")
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
        ValueError: two names of the checkpoint mean the same parameter, or it has no SANA
            transformer or no pixel decoder.
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


def skipped_names(names: Iterable[str]) -> dict[str, int]:
    """What a checkpoint holds besides the model, and in how many tensors: {"vision_tower": 12}."""
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
