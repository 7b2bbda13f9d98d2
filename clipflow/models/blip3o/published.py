"""Published BLIP3-o checkpoints: their sizes (specs of BLIP3-o, sections A.1, A.5 and A.10)."""

from __future__ import annotations

from clipflow.errors import InputError
from clipflow.models.blip3o.config import (
    BLIP3oConfig,
    MultimodalTextConfig,
    TokenIds,
    VisionConfig,
)
from clipflow.models.blip3o.eva import CLIP_MEAN, CLIP_STD
from clipflow.models.dits.lumina import LuminaConfig, feed_forward_width

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
    width: int = 1280, *, depth: int = 32, mlp: int = 3420, full: tuple[int, ...] = (7, 15, 23, 31)
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
        image_size=448,
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


def _config(text: MultimodalTextConfig, vision: VisionConfig, dit: LuminaConfig) -> BLIP3oConfig:
    return BLIP3oConfig(
        vision=vision,
        text=text,
        dit=dit,
        tokens=special_tokens(text.vocab_size),
        target=None,
        n_query=64,
        latent_side=8,
        flow_shift=1.0,
        default_guidance_scale=3.0,
        default_steps=30,
        output_size=1024,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        system_message=SYSTEM_MESSAGE,
        noise_dtype="float16",  # what the reference runs in
    )
