"""Published BLIP3-o checkpoints: their architecture, from config.json and the tensors' shapes.

config.json is Qwen2.5-VL's, and says nothing of the diffusion transformer (specs of BLIP3-o,
sections A.1, A.5 and A.10).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from clipflow.errors import InputError
from clipflow.models.blip3o.config import (
    BLIP3oConfig,
    MultimodalTextConfig,
    TokenIds,
    VisionConfig,
)
from clipflow.models.blip3o.eva import CLIP_MEAN, CLIP_STD, EVAConfig
from clipflow.models.blip3o.eva_keys import eva_config
from clipflow.models.blip3o.keys import TARGET
from clipflow.models.blip3o.published_fields import SCHEMA
from clipflow.models.blip3o.published_shapes import dit_config, vision_sizes
from clipflow.models.dits.lumina import LuminaConfig, feed_forward_width
from clipflow.models.folders.fields import Fields, shown
from clipflow.models.folders.shapes import Shapes

MODEL_TYPES = ("blip3o_qwen", "blip3o_qwen_inference")
SYSTEM_MESSAGE = "You are a helpful assistant."
# Qwen2.5-VL's 151665 entries, and three that training added.
VOCABULARY = 151668
SPECIAL_TOKENS = 25
# Width of the language model -> heads of queries, of keys and values; 64 is a size for tests.
TEXT_HEADS = {2048: (16, 2), 3584: (28, 4), 64: (4, 2)}
# Width of the DiT -> its heads, of queries and of keys alike.
DIT_HEADS = {1792: 28, 64: 4}
# Width of the vision transformer -> its heads.
VISION_HEADS = {1280: 16, 32: 2}
CLIP_CHANNELS = 1792
LATENT_SIDE, IMAGE_SIZE = 8, 448
FULL_ATTENTION = (7, 15, 23, 31)
# What the pooling of the training target is called -> squares of how many patches it averages.
POOLINGS = {"early_pool2d_4": 4}
# Rows by which a vocabulary may differ from what config.json says: Qwen2.5-VL's spare rows are cut.
VOCABULARY_SLACK = 1024


def blip3o_config(size: str) -> BLIP3oConfig:
    """The configuration of "4b", "8b", or "tiny", which has their form at small widths.

    Raises:
        InputError: no such size.
    """
    if size == "4b":
        return _config(_text(2048, 11008, 36, VOCABULARY, tied=True), _vision(), _dit(2048))
    if size == "8b":
        return _config(_text(3584, 18944, 28, VOCABULARY), _vision(), _dit(3584))
    if size == "tiny":
        vision = _vision(32, depth=2, mlp=48, full=(1,))
        return _config(_text(64, 96, 2, 320), vision, _dit(64, width=64, layers=2, multiple_of=32))
    raise InputError(f"size must be one of tiny, 4b, 8b, got {size!r}")


def config_from_published(values: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> BLIP3oConfig:
    """The configuration of a published checkpoint.

    None was trained to edit; `edits` in config.json, which is our field, says that one was.

    Args:
        values: its config.json.
        shapes: shape of every tensor, under our names. The language model is tied when there is
            no `lm_head.weight`.

    Raises:
        ValueError: one line: an unknown field, a value of a wrong type or one that contradicts the
            weights, or a tensor that tells a size is missing.
    """
    fields, tensors = Fields(values, SCHEMA), Shapes(shapes, SCHEMA.family)
    fields.fixed("gen_pooling", *POOLINGS)
    fields.fixed("edits", True, False)
    # Later versions of transformers write the language model's fields into an object of its own.
    nested = fields.get("text_config") is not None
    text = _text_from(fields.section("text_config") if nested else fields, tensors)
    vision = _vision_from(fields.section("vision_config"), tensors)
    fields.section("vision_config").agree("out_hidden_size", text.hidden_size)
    dit = dit_config(tensors)
    n_query, width = tensors.of("latent_queries", 3)[1:]
    fields.agree("n_query", n_query)
    fields.agree("gen_hidden_size", dit.in_channels)
    for name, found in (("queries", width), ("condition", dit.condition_channels)):
        if found != text.hidden_size:
            raise ValueError(
                f"published BLIP3-o: the {name} must be {text.hidden_size} wide as the language "
                f"model, got {found}"
            )
    tokens = _tokens(fields, text.vocab_size)
    target = _target(shapes, fields)
    found = _config(text, vision, dit, tokens=tokens, n_query=n_query, target=target)
    return dataclasses.replace(found, edits=fields.get("edits") is True)


def _target(shapes: Mapping[str, tuple[int, ...]], fields: Fields) -> EVAConfig | None:
    own = {n.removeprefix(TARGET): shape for n, shape in shapes.items() if n.startswith(TARGET)}
    pooling = fields.get("gen_pooling") or "early_pool2d_4"
    return eva_config(own, pool=POOLINGS[pooling]) if own else None


def _vision_from(fields: Fields, tensors: Shapes) -> VisionConfig:
    found = vision_sizes(tensors)
    fields.fixed("model_type", "qwen2_5_vl", "qwen2_5_vl_vision")
    fields.fixed("hidden_act", "silu")
    fields.agree("in_channels", 3)
    fields.agree("in_chans", 3)
    for name, size in found.items():
        fields.agree(name, size)
    full = fields.get("fullatt_block_indexes")
    full = list(FULL_ATTENTION) if full is None else full
    if not isinstance(full, list) or not all(
        type(block) is int and 0 <= block < found["depth"] for block in full
    ):
        raise ValueError(
            f"config.json: vision_config.fullatt_block_indexes must be a list of 0 to "
            f"{found['depth'] - 1}, got {shown(full)}"
        )
    return VisionConfig(
        **found,
        num_heads=fields.integer("num_heads", VISION_HEADS.get(found["hidden_size"])),
        window_size=fields.integer("window_size", 112),
        fullatt_block_indexes=tuple(full),
        image_size=IMAGE_SIZE,
    )


def _text_from(fields: Fields, tensors: Shapes) -> MultimodalTextConfig:
    layers = "language_model.layers"
    rows, width = tensors.of("language_model.embed_tokens.weight", 2)
    mlp = tensors.of(f"{layers}.0.mlp.gate_proj.weight", 2)[0]
    depth = tensors.count(layers)
    fields.fixed("hidden_act", "silu")
    fields.fixed("use_sliding_window", False)
    fields.fixed("layer_types", ["full_attention"] * depth)
    fields.agree("hidden_size", width)
    fields.agree("intermediate_size", mlp)
    fields.agree("num_hidden_layers", depth)
    declared = fields.integer("vocab_size", rows)
    if abs(declared - rows) > VOCABULARY_SLACK:
        raise ValueError(
            f"config.json: vocab_size must be about {rows} as the weights are, got {declared}"
        )
    heads, key_value_heads = TEXT_HEADS.get(width, (None, None))
    heads = fields.integer("num_attention_heads", heads)
    head_dim = width // heads
    fields.agree("head_dim", head_dim)
    theta, section = _rope(fields, head_dim)
    return MultimodalTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", key_value_heads),
        rope_theta=theta,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=fields.integer("max_position_embeddings", 128000),
        tie_word_embeddings="lm_head.weight" not in tensors,
        mrope_section=section,
    )


def _rope(fields: Fields, head_dim: int) -> tuple[float, tuple[int, int, int]]:
    """(theta, mrope_section), which may be written in the form of transformers 4 or 5."""
    theta, section = fields.number("rope_theta", 1e6), list(mrope_section(head_dim))
    for name in ("rope_scaling", "rope_parameters"):
        found = fields.get(name)
        if found is None:
            continue
        if not isinstance(found, Mapping) or found.get("rope_type", found.get("type")) not in (
            "default",
            "mrope",
        ):
            raise ValueError(
                f"config.json: {name} must be of type default or mrope, got {shown(found)}"
            )
        theta = found.get("rope_theta", theta)
        section = found.get("mrope_section", section)
    if type(theta) not in (int, float) or not 0 < theta < float("inf"):
        raise ValueError(f"config.json: rope_theta must be a number above 0, got {shown(theta)}")
    whole = isinstance(section, list) and all(type(n) is int and n >= 0 for n in section)
    if not whole or len(section) != 3 or 2 * sum(section) != head_dim:
        raise ValueError(
            f"config.json: mrope_section must be 3 numbers of pairs, {head_dim // 2} in all, got "
            f"{shown(section)}"
        )
    return float(theta), tuple(section)


def _tokens(fields: Fields, vocab_size: int) -> TokenIds:
    """Qwen2.5-VL's special tokens and BLIP3-o's stand in a fixed order (specs section A.2)."""
    image_pad = fields.integer("image_token_id", special_tokens(vocab_size).image_pad)
    known = special_tokens(image_pad - 12 + SPECIAL_TOKENS)
    if not known.pad >= 0 or known.image_start >= vocab_size:
        raise ValueError(
            f"config.json: image_token_id must be from 12 to {vocab_size - 11}, as [IMG] comes 10 "
            f"after it in the vocabulary, got {image_pad}"
        )
    fields.agree("vision_start_token_id", known.vision_start)
    fields.agree("vision_end_token_id", known.vision_end)
    pad = fields.get("pad_token_id")
    if pad is not None and (type(pad) is not int or not 0 <= pad < vocab_size):
        raise ValueError(
            f"config.json: pad_token_id must be from 0 to {vocab_size - 1}, got {shown(pad)}"
        )
    return known if pad is None else dataclasses.replace(known, pad=pad)


def special_tokens(vocab_size: int) -> TokenIds:
    """Qwen2.5-VL's special tokens and BLIP3-o's three are the last of the vocabulary."""
    first = vocab_size - SPECIAL_TOKENS
    return TokenIds(
        pad=first,
        im_end=first + 2,
        vision_start=first + 9,
        vision_end=first + 10,
        image_pad=first + 12,
        image_start=first + 22,
    )


def _text(
    width: int, mlp: int, layers: int, vocab_size: int, *, tied: bool = False
) -> MultimodalTextConfig:
    heads, key_value_heads = TEXT_HEADS[width]
    return MultimodalTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=128000,
        tie_word_embeddings=tied,
        mrope_section=mrope_section(width // heads),
    )


def mrope_section(head_dim: int) -> tuple[int, int, int]:
    """A quarter of a head's pairs turns with time, the rest with rows and columns alike."""
    time = head_dim // 8
    space = (head_dim // 2 - time) // 2
    return (head_dim // 2 - 2 * space, space, space)


def _vision(
    width: int = 1280, *, depth: int = 32, mlp: int = 3420, full: tuple[int, ...] = FULL_ATTENTION
) -> VisionConfig:
    return VisionConfig(
        hidden_size=width,
        depth=depth,
        num_heads=VISION_HEADS[width],
        intermediate_size=mlp,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=full,
        image_size=IMAGE_SIZE,
    )


def _dit(
    text_width: int, *, width: int = 1792, layers: int = 24, multiple_of: int = 256
) -> LuminaConfig:
    return LuminaConfig(
        in_channels=CLIP_CHANNELS,
        hidden_size=width,
        num_layers=layers,
        num_attention_heads=DIT_HEADS[width],
        num_kv_heads=DIT_HEADS[width],
        intermediate_size=feed_forward_width(width, multiple_of),
        condition_channels=text_width,
        patch_size=1,
        norm_eps=1e-5,
        rope_theta=10000.0,
    )


def _config(
    text: MultimodalTextConfig,
    vision: VisionConfig,
    dit: LuminaConfig,
    *,
    tokens: TokenIds | None = None,
    n_query: int = 64,
    target: EVAConfig | None = None,
) -> BLIP3oConfig:
    return BLIP3oConfig(
        vision=vision,
        text=text,
        dit=dit,
        tokens=tokens or special_tokens(text.vocab_size),
        target=target,
        n_query=n_query,
        latent_side=LATENT_SIDE,
        flow_shift=1.0,
        default_guidance_scale=3.0,
        default_steps=30,
        output_size=1024,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        system_message=SYSTEM_MESSAGE,
        noise_dtype="float16",  # what the reference runs in
    )
