"""The small BLIP3-o of the scenes world: its sizes, and its state before any training."""

from __future__ import annotations

import torch
from torch import nn

from clipflow.models.blip3o.config import (
    BLIP3oConfig,
    MultimodalTextConfig,
    TokenIds,
    VisionConfig,
)
from clipflow.models.blip3o.eva import CLIP_MEAN, CLIP_STD, EVAConfig
from clipflow.models.blip3o.model import BLIP3oModel
from clipflow.models.dits.lumina import LuminaConfig, feed_forward_width

FEATURE_CHANNELS = 96
DIT_WIDTH = 192
TEXT_WIDTH = 128
N_QUERY = 16
GATE = 0.3


VISION = VisionConfig(
    hidden_size=160,
    depth=4,
    num_heads=5,
    intermediate_size=480,
    patch_size=8,
    temporal_patch_size=2,
    spatial_merge_size=1,
    window_size=64,
    fullatt_block_indexes=(0, 1, 2, 3),
    image_size=64,
)
TARGET = EVAConfig(
    image_size=64,
    patch_size=8,
    hidden_size=FEATURE_CHANNELS,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=288,
    layer_norm_eps=1e-6,
    pool=2,
)
DIT = LuminaConfig(
    in_channels=FEATURE_CHANNELS,
    hidden_size=DIT_WIDTH,
    num_layers=6,
    num_attention_heads=6,
    num_kv_heads=6,
    intermediate_size=feed_forward_width(DIT_WIDTH),
    condition_channels=TEXT_WIDTH,
    patch_size=1,
    norm_eps=1e-5,
    rope_theta=10000.0,
)


def scenes_config(vocab_size: int, tokens: TokenIds) -> BLIP3oConfig:
    """Sizes of the scenes model: 64 px pictures, 4 x 4 CLIP features of 96 channels."""
    return BLIP3oConfig(
        vision=VISION,
        text=MultimodalTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=320,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=10000.0,
            rms_norm_eps=1e-6,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            # Of pairs that turn by 1 to 10000^(-15/16) per position, columns would get the slow
            # ones in the usual shares, and 8 of them would look the same. There is no time.
            mrope_section=(0, 3, 13),
        ),
        dit=DIT,
        target=TARGET,
        tokens=tokens,
        n_query=N_QUERY,
        latent_side=TARGET.target_side,
        flow_shift=1.0,
        default_guidance_scale=2.0,
        default_steps=30,
        output_size=64,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        system_message="",
        noise_dtype="float32",
        edits=True,
    )


@torch.no_grad()
def initialize(model: BLIP3oModel) -> None:
    """Set the parameters that a scenes model is trained from; PyTorch's defaults elsewhere.

    The first velocities are zero. Gates begin open by tanh(0.3): were they closed, nothing but
    they would learn at first.
    """
    nn.init.normal_(model.latent_queries, std=model.config.text.hidden_size**-0.5)
    for block in model.dit.layers:
        block.gate.fill_(GATE)
        width = model.config.dit.hidden_size
        for gate in (1, 3):  # of attention and of the feed-forward layer
            block.norm1.linear.bias[gate * width : (gate + 1) * width] = GATE
    nn.init.zeros_(model.dit.norm_out["linear_2"].weight)
    nn.init.zeros_(model.dit.norm_out["linear_2"].bias)


def scenes_model(vocab_size: int, tokens: TokenIds, seed: int = 0) -> BLIP3oModel:
    """An untrained scenes model; the same for the same seed."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = BLIP3oModel(scenes_config(vocab_size, tokens))
        initialize(model)
    finally:
        torch.random.set_rng_state(generator_state)
    return model
