"""Published BLIP3o-NEXT checkpoints: their architecture, from config.json and the tensors' shapes.

config.json is Qwen3's with the ids of the image vocabulary; of SANA and the decoder it says
nothing but where they came from (specs section B.2).
"""

from __future__ import annotations

from collections.abc import Mapping

from clipflow.models.blip3o_next.config import BLIP3oNextConfig, Qwen3TextConfig, TokenIds
from clipflow.models.blip3o_next.keys import DECODER, DIT
from clipflow.models.dc_ae.shapes import decoder_config
from clipflow.models.dits.sana_shapes import sana_config
from clipflow.models.folders.fields import ANY, Fields, Schema, shown
from clipflow.models.folders.shapes import Shapes

FAMILY = "BLIP3o-NEXT"
MODEL_TYPES = ("blip3o_qwen", "blip3o_qwen_inference")  # those of the first BLIP3-o, too
_QWEN3 = """
    attention_bias attention_dropout head_dim hidden_act hidden_size initializer_range
    intermediate_size layer_types max_position_embeddings max_window_layers num_attention_heads
    num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta
    sliding_window use_sliding_window vocab_size
"""
_IMAGES = """
    delay_load diffusion_name_or_path image_end_tag_id image_end_token_id image_start_tag_id
    image_start_token_id load_embeddings_from_vision num_image_tokens num_new_tokens
    num_scale_tokens pos_skipping_range scale_end_token_id scale_start_token_id use_pos_skipping
"""
SCHEMA = Schema(
    family=FAMILY,
    known={"": frozenset((ANY + _QWEN3 + _IMAGES).split())},
    note_prefixes=(
        "mm_",
        "tune_",
        "freeze_",
        "tokenizer_",
        "image_aspect",
        "image_grid",
        "use_mm",
        "gen_",
        "vision_tower",
        "pretrain_",
    ),
    note_suffixes=("_path", "_lr"),
)
# Of the published models, and in no config.json (specs sections B.1 and B.4).
TOKENS_PER_IMAGE = 729
LATENT_SIDE = 32
SCALING_FACTOR = 0.41407
SYSTEM_MESSAGE = "You are a helpful assistant."


def is_published(values: Mapping) -> bool:
    """Whether the object in a config.json is that of a published BLIP3o-NEXT."""
    return values.get("model_type") in MODEL_TYPES and "image_start_token_id" in values


def config_from_published(
    values: Mapping, shapes: Mapping[str, tuple[int, ...]]
) -> BLIP3oNextConfig:
    """The configuration of a published checkpoint.

    SANA has no position table: the checkpoints were trained with diffusers 0.34, which adds none
    where SANA's config leaves `interpolation_scale` empty.

    Args:
        values: its config.json.
        shapes: shape of every tensor, under our names. The language model is tied when there is
            no `lm_head.weight`.

    Raises:
        ValueError: one line: an unknown field, a value of a wrong type or one that contradicts the
            weights, or a tensor that tells a size is missing.
    """
    fields, tensors = Fields(values, SCHEMA), Shapes(shapes, FAMILY)
    text = _text(fields, tensors)
    decoder = decoder_config(tensors, DECODER)
    return BLIP3oNextConfig(
        text=text,
        dit=sana_config(tensors, DIT, side=LATENT_SIDE, interpolation_scale=0.0),
        decoder=decoder,
        tokens=_tokens(fields, text.vocab_size),
        tokens_per_image=TOKENS_PER_IMAGE,
        scaling_factor=SCALING_FACTOR,
        flow_shift=1.0,
        default_guidance_scale=2.0,
        default_steps=30,
        output_size=LATENT_SIDE * decoder.upscale,
        system_message=SYSTEM_MESSAGE,
        noise_dtype="bfloat16",  # what the reference draws in
    )


def _text(fields: Fields, tensors: Shapes) -> Qwen3TextConfig:
    """Qwen3's sizes; its heads are told by the norm of a head, whatever config.json says."""
    layers = "language_model.layers"
    attention = f"{layers}.0.self_attn"
    rows, width = tensors.of("language_model.embed_tokens.weight", 2)
    mlp = tensors.of(f"{layers}.0.mlp.gate_proj.weight", 2)[0]
    head_dim = tensors.of(f"{attention}.q_norm.weight", 1)[0]
    heads = tensors.of(f"{attention}.q_proj.weight", 2)[0] // head_dim
    key_value_heads = tensors.of(f"{attention}.k_proj.weight", 2)[0] // head_dim
    depth = tensors.count(layers)
    fields.fixed("hidden_act", "silu")
    fields.fixed("use_sliding_window", False)
    fields.fixed("attention_bias", False)
    fields.fixed("layer_types", ["full_attention"] * depth)
    agreed = {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": rows,
    }
    for name, wanted in agreed.items():
        fields.agree(name, wanted)
    return Qwen3TextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        rope_theta=_rope_theta(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=fields.integer("max_position_embeddings", 40960),
        tie_word_embeddings="lm_head.weight" not in tensors,
    )


def _rope_theta(fields: Fields) -> float:
    """In the form of transformers 4 or 5; the reference leaves scaling out (specs section B.5)."""
    theta = fields.number("rope_theta", 1e6)
    written = fields.get("rope_parameters")
    found = written.get("rope_theta", theta) if isinstance(written, Mapping) else theta
    if type(found) not in (int, float) or not 0 < found < float("inf"):
        raise ValueError(
            f"config.json: rope_parameters.rope_theta must be a number above 0, got {shown(found)}"
        )
    return float(found)


def _tokens(fields: Fields, vocab_size: int) -> TokenIds:
    first = fields.integer("image_start_token_id")
    count = fields.get("num_image_tokens")
    if count is None:
        count = fields.integer("image_end_token_id") - first + 1
    if type(count) is not int or not 0 < count <= vocab_size - first:
        raise ValueError(
            f"config.json: num_image_tokens must be from 1 to {vocab_size - first}, what there is "
            f"room for from image_start_token_id on, got {shown(count)}"
        )
    ends = fields.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    # Qwen3's first token, <|endoftext|>, is what rows are filled with.
    pad = next((v for n in ("pad_token_id", "bos_token_id") if (v := fields.get(n)) is not None), 0)
    for name, found in (("eos_token_id", ends), ("pad_token_id", [pad])):
        if not all(type(number) is int and 0 <= number < vocab_size for number in found):
            raise ValueError(
                f"config.json: {name} must be from 0 to {vocab_size - 1}, got {shown(found)}"
            )
    return TokenIds(
        pad=pad,
        image_start=fields.integer("image_start_tag_id"),
        image_end=fields.integer("image_end_tag_id"),
        scale=fields.integer("scale_start_token_id"),
        first_image=first,
        image_count=count,
        eos=tuple(ends),
    )
