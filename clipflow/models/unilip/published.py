"""Published UniLIP checkpoints: their architecture, from config.json and the tensors' shapes.

A published config.json holds neither the DiT's nor the decoder's architecture, and its vision
section describes a tower that the reference replaces (specs section 6): widths, depths, kernels and
the vocabulary are read from the shapes, head counts from config.json or a table.
"""

from __future__ import annotations

from collections.abc import Mapping

from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.dc_ae.shapes import decoder_config
from clipflow.models.dits.sana import SanaConfig
from clipflow.models.dits.sana_shapes import sana_config
from clipflow.models.folders.fields import Fields, shown
from clipflow.models.folders.shapes import Shapes
from clipflow.models.unilip.config import (
    TextConfig,
    TokenIds,
    UniLIPConfig,
    VisionConfig,
)
from clipflow.models.unilip.published_fields import SCHEMA
from clipflow.models.unilip.published_shapes import (
    VISION_HEADS,
    vision_config,
)

MODEL_TYPE = "unilip_internvl"
DIT = "dit."
DECODER = "vae_decoder.decoder."
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# InternVL's own, which its language model was trained with; drawing prompts have none.
SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、"
    "清华大学及多家合作单位联合开发的多模态大语言模型。"
)
VOCABULARY = 151674
IMAGE_TOKEN = 151667
# Rows by which a vocabulary may differ from what config.json says: tokens that training added.
VOCABULARY_SLACK = 1024
# Width of the language model -> heads of queries, of keys and values.
TEXT_HEADS = {896: (14, 2), 1536: (12, 2), 64: (4, 2)}
# Width of the DiT -> what published models multiply latents by.
FACTORS = {1152: 10.6, 2240: 9.5}


def unilip_1b_config() -> UniLIPConfig:
    """UniLIP-1B."""
    return _config(_text(896, 4864, 24), _dit(28, (36, 32), (16, 72)), FACTORS[1152])


def unilip_3b_config() -> UniLIPConfig:
    """UniLIP-3B."""
    return _config(_text(1536, 8960, 28), _dit(20, (70, 32), (20, 112)), FACTORS[2240])


def config_from_published(values: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> UniLIPConfig:
    """The configuration of a published checkpoint.

    The DiT's position table is on, with scale 1, whatever library is installed: checkpoints were
    trained with diffusers 0.32.2, which adds it always, while diffusers from 0.33 on adds none
    where SANA's config leaves `interpolation_scale` empty, which ruins the pictures (specs sections
    2.5 and 10.1). For a checkpoint that was trained otherwise, `dit_interpolation_scale` in its
    config.json, which is our field, sets the scale, or with 0 leaves the table out; in folders
    that `save_pretrained` writes, the same switch is `dit.position_table`.

    Args:
        values: its config.json.
        shapes: shape of every tensor, under our names. The language model is tied when there is
            no `lm_head.weight`.

    Raises:
        ValueError: one line: an unknown field, a value of a wrong type or one that contradicts the
            weights, or a tensor that tells a size is missing.
    """
    fields, tensors = Fields(values, SCHEMA), Shapes(shapes, SCHEMA.family)
    fields.fixed("vision_feature_layer", -1)
    fields.fixed("vision_feature_select_strategy", "default")
    fields.fixed("projector_hidden_act", "gelu")
    vision = _vision_from(fields.section("vision_config"), tensors)
    side = vision.image_size // (vision.shuffle * vision.patch_size)
    fields.fixed("downsample_ratio", 1 / vision.shuffle)
    fields.agree("image_seq_length", side * side)
    text = _text_from(fields.section("text_config"), tensors)
    n_query = tensors.of("latent_queries", 3)[1]
    fields.agree("n_query", n_query)
    layers = tensors.count("llm_connector.layers")
    fields.agree("connect_layer", layers)
    dit = sana_config(tensors, DIT, side=side, interpolation_scale=_interpolation_scale(fields))
    return UniLIPConfig(
        vision=vision,
        text=text,
        dit=dit,
        decoder=decoder_config(tensors, DECODER),
        tokens=_tokens(fields, text.vocab_size),
        n_query=n_query,
        connect_layer=layers,
        unilip_factor=fields.number("unilip_factor", FACTORS.get(dit.hidden_size)),
        **_shared(vision),
    )


def _vision_from(fields: Fields, tensors: Shapes) -> VisionConfig:
    """The tower is the original InternViT; `fields` describe the one that it replaces."""
    fields.fixed("model_type", "internvl_vision", "intern_vit_6b")
    fields.fixed("hidden_act", "gelu")
    fields.fixed("norm_type", "layer_norm")
    for name in ("use_qk_norm", "qk_normalization", "use_mask_token", "use_moe"):
        fields.fixed(name, False)
    for name in ("attention_bias", "qkv_bias", "use_absolute_position_embeddings"):
        fields.fixed(name, True)
    fields.agree("num_channels", 3)
    width = tensors.of("vision_tower.embeddings.patch_embedding.weight", 4)[0]
    heads = fields.integer("num_attention_heads", VISION_HEADS.get(width))
    eps = fields.number("layer_norm_eps", 1e-6)
    vision = vision_config(tensors, heads=heads, layer_norm_eps=eps)
    fields.agree("hidden_size", width)
    fields.side("image_size", vision.image_size)
    fields.side("patch_size", vision.patch_size)
    return vision


def _text_from(fields: Fields, tensors: Shapes) -> TextConfig:
    layers = "language_model.layers"
    rows, width = tensors.of("language_model.embed_tokens.weight", 2)
    mlp = tensors.of(f"{layers}.0.mlp.gate_proj.weight", 2)[0]
    depth = tensors.count(layers)
    fields.fixed("model_type", "qwen2")
    fields.fixed("hidden_act", "silu")
    fields.fixed("use_sliding_window", False)
    fields.fixed("use_moe", False)
    fields.fixed("layer_types", ["full_attention"] * depth)
    fields.agree("hidden_size", width)
    fields.agree("intermediate_size", mlp)
    fields.agree("num_hidden_layers", depth)
    declared = fields.integer("vocab_size", rows)
    if abs(declared - rows) > VOCABULARY_SLACK:
        raise ValueError(
            f"config.json: text_config.vocab_size must be about {rows} as the weights are, "
            f"got {declared}"
        )
    heads, key_value_heads = TEXT_HEADS.get(width, (None, None))
    heads = fields.integer("num_attention_heads", heads)
    fields.agree("head_dim", width // heads)
    return TextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", key_value_heads),
        rope_theta=_rope_theta(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=fields.integer("max_position_embeddings", 32768),
        tie_word_embeddings="lm_head.weight" not in tensors,
    )


def _rope_theta(fields: Fields) -> float:
    """Of the rotary embedding, which may be written in the form of transformers 4 or 5.

    Dynamic scaling changes nothing up to max_position_embeddings, and prompts end far before.
    """
    theta = fields.number("rope_theta", 1e6)
    for name in ("rope_scaling", "rope_parameters"):
        found = fields.get(name)
        if found is None:
            continue
        if not isinstance(found, Mapping) or found.get("rope_type", found.get("type")) not in (
            "default",
            "dynamic",
        ):
            raise ValueError(
                f"config.json: text_config.{name} must be of type default or dynamic, "
                f"got {shown(found)}"
            )
        theta = found.get("rope_theta", theta)
    if type(theta) not in (int, float) or not 0 < theta < float("inf"):
        raise ValueError(
            "config.json: text_config.rope_parameters.rope_theta must be a number above 0, "
            f"got {shown(theta)}"
        )
    return float(theta)


def _interpolation_scale(fields: Fields) -> float:
    """0 where the switch leaves the table out."""
    if fields.get("dit_interpolation_scale") == 0:
        return 0.0
    return fields.number("dit_interpolation_scale", 1.0)


def _tokens(fields: Fields, vocab_size: int) -> TokenIds:
    """Qwen2's special tokens stand in a fixed order before <IMG_CONTEXT> (specs section 4)."""
    context = fields.integer("image_token_id", IMAGE_TOKEN)
    if not 24 <= context < vocab_size:
        raise ValueError(
            f"config.json: image_token_id must be from 24 to {vocab_size - 1}, the vocabulary's "
            f"last, got {context}"
        )
    pad = fields.get("pad_token_id")
    pad = context - 24 if pad is None else pad
    if type(pad) is not int or not 0 <= pad < vocab_size:
        raise ValueError(
            f"config.json: pad_token_id must be from 0 to {vocab_size - 1}, got {shown(pad)}"
        )
    return TokenIds(
        pad=pad,
        img_start=context - 2,
        img_end=context - 1,
        img_context=context,
        im_end=context - 22,
    )


def _config(text: TextConfig, dit: SanaConfig, factor: float) -> UniLIPConfig:
    vision = VisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=VISION_HEADS[1024],
        intermediate_size=4096,
        image_size=448,
        patch_size=14,
        shuffle=2,
        layer_norm_eps=1e-6,
    )
    return UniLIPConfig(
        vision=vision,
        text=text,
        dit=dit,
        decoder=DecoderConfig(
            latent_channels=32,
            attention_head_dim=32,
            block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            block_out_channels=(128, 256, 512, 512, 1024, 1024),
            layers_per_block=(3,) * 6,
            qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        ),
        tokens=_tokens(Fields({}, SCHEMA), text.vocab_size),
        n_query=256,
        connect_layer=6,
        unilip_factor=factor,
        **_shared(vision),
    )


def _text(width: int, mlp: int, layers: int) -> TextConfig:
    heads, key_value_heads = TEXT_HEADS[width]
    return TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )


def _dit(layers: int, self_heads: tuple[int, int], cross_heads: tuple[int, int]) -> SanaConfig:
    """Heads are (number, width of one)."""
    return SanaConfig(
        in_channels=32,
        out_channels=32,
        num_layers=layers,
        num_attention_heads=self_heads[0],
        attention_head_dim=self_heads[1],
        num_cross_attention_heads=cross_heads[0],
        cross_attention_head_dim=cross_heads[1],
        caption_channels=2304,
        mlp_ratio=2.5,
        sample_size=16,
        norm_eps=1e-6,
        position_table=True,
        interpolation_scale=1.0,
    )


def _shared(vision: VisionConfig) -> dict[str, object]:
    """What no published config.json says and all published models have."""
    return {
        "flow_shift": 3.0,
        "output_size": vision.image_size,
        "default_guidance_scale": 4.5,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "system_message": SYSTEM_MESSAGE,
        "noise_dtype": "bfloat16",  # what the reference runs in
    }
