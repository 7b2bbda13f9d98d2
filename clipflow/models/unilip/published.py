"""Published UniLIP checkpoints: their sizes, and what their config.json does not say.

A published config.json holds neither the DiT's nor the decoder's architecture (specs section 6):
widths, depths and the vocabulary are read from the tensors' shapes, the head counts from a table.
"""

# Vision tower, decoder and special tokens are the same in all sizes.

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from clipflow.models.dits.sana import SanaConfig
from clipflow.models.unilip.config import (
    DecoderConfig,
    TextConfig,
    TokenIds,
    UniLIPConfig,
    VisionConfig,
)

MODEL_TYPE = "unilip_internvl"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# InternVL's own, which its language model was trained with; drawing prompts have none.
SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、"
    "清华大学及多家合作单位联合开发的多模态大语言模型。"
)
VISION = VisionConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    image_size=448,
    patch_size=14,
    shuffle=2,
    layer_norm_eps=1e-6,
)
DECODER = DecoderConfig(
    latent_channels=32,
    attention_head_dim=32,
    block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    block_out_channels=(128, 256, 512, 512, 1024, 1024),
    layers_per_block=(3,) * 6,
    qkv_multiscales=((), (), (), (5,), (5,), (5,)),
)
TOKENS = TokenIds(pad=151643, img_start=151665, img_end=151666, img_context=151667, im_end=151645)
VOCABULARY = 151674
QUERIES = 256
CONNECTOR_LAYERS = 6
CAPTION_CHANNELS = 2304


@dataclass(frozen=True, kw_only=True)
class PublishedSize:
    """What differs between the published models; heads are (number, width of one)."""

    text_width: int
    text_layers: int
    text_mlp: int
    text_heads: tuple[int, int]  # query heads, key-value heads
    dit_width: int
    dit_layers: int
    self_heads: tuple[int, int]
    cross_heads: tuple[int, int]
    unilip_factor: float


SIZES = {
    "1b": PublishedSize(
        text_width=896,
        text_layers=24,
        text_mlp=4864,
        text_heads=(14, 2),
        dit_width=1152,
        dit_layers=28,
        self_heads=(36, 32),
        cross_heads=(16, 72),
        unilip_factor=10.6,
    ),
    "3b": PublishedSize(
        text_width=1536,
        text_layers=28,
        text_mlp=8960,
        text_heads=(12, 2),
        dit_width=2240,
        dit_layers=20,
        self_heads=(70, 32),
        cross_heads=(20, 112),
        unilip_factor=9.5,
    ),
}


def unilip_1b_config() -> UniLIPConfig:
    """UniLIP-1B."""
    return _config(SIZES["1b"])


def unilip_3b_config() -> UniLIPConfig:
    """UniLIP-3B."""
    return _config(SIZES["3b"])


def config_from_published(values: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> UniLIPConfig:
    """The configuration of a published checkpoint.

    Args:
        values: its config.json.
        shapes: shape of every tensor, under our names. The language model is tied when there is
            no `lm_head.weight`.

    Raises:
        ValueError: the widths are those of no published model, or a tensor that tells a size is
            missing.
    """
    width = _shape(shapes, "language_model.embed_tokens.weight", 2)[1]
    dit_width = _shape(shapes, "dit.scale_shift_table", 2)[1]
    for size in SIZES.values():
        if (size.text_width, size.dit_width) == (width, dit_width):
            break
    else:
        known = [(size.text_width, size.dit_width) for size in SIZES.values()]
        raise ValueError(
            f"published UniLIP: widths of the language model and the DiT must be one of {known}, "
            f"got {(width, dit_width)}"
        )
    return _config(
        size,
        vocab_size=shapes["language_model.embed_tokens.weight"][0],
        tied="lm_head.weight" not in shapes,
        n_query=_shape(shapes, "latent_queries", 3)[1],
        connect_layer=_count(shapes, "llm_connector.layers"),
        unilip_factor=float(values.get("unilip_factor", size.unilip_factor)),
    )


def _config(
    size: PublishedSize,
    *,
    vocab_size: int = VOCABULARY,
    tied: bool = False,
    n_query: int = QUERIES,
    connect_layer: int = CONNECTOR_LAYERS,
    unilip_factor: float | None = None,
) -> UniLIPConfig:
    return UniLIPConfig(
        vision=VISION,
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=size.text_width,
            intermediate_size=size.text_mlp,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_heads[0],
            num_key_value_heads=size.text_heads[1],
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            max_position_embeddings=32768,
            tie_word_embeddings=tied,
        ),
        dit=_dit(size),
        decoder=DECODER,
        tokens=TOKENS,
        n_query=n_query,
        connect_layer=connect_layer,
        unilip_factor=size.unilip_factor if unilip_factor is None else unilip_factor,
        flow_shift=3.0,
        output_size=448,
        default_guidance_scale=4.5,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        system_message=SYSTEM_MESSAGE,
        noise_dtype="bfloat16",  # what the reference runs in
    )


def _dit(size: PublishedSize) -> SanaConfig:
    return SanaConfig(
        in_channels=DECODER.latent_channels,
        out_channels=DECODER.latent_channels,
        num_layers=size.dit_layers,
        num_attention_heads=size.self_heads[0],
        attention_head_dim=size.self_heads[1],
        num_cross_attention_heads=size.cross_heads[0],
        cross_attention_head_dim=size.cross_heads[1],
        caption_channels=CAPTION_CHANNELS,
        mlp_ratio=2.5,
        sample_size=16,
        norm_eps=1e-6,
        position_table=True,
        interpolation_scale=1.0,
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, dims: int) -> tuple[int, ...]:
    found = shapes.get(name)
    if found is None or len(found) != dims:
        raise ValueError(f"published UniLIP: {name} must have {dims} dimensions, got {found}")
    return found


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many numbered modules there are under `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match.group(1) for name in shapes if (match := pattern.match(name))})
