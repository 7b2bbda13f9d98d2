"""The small UniLIP of the scenes world: its sizes, and its state before any training."""

import torch
from torch import nn

from clipflow.models.dits.sana import SanaConfig
from clipflow.models.unilip.config import (
    DecoderConfig,
    TextConfig,
    TokenIds,
    UniLIPConfig,
    VisionConfig,
)
from clipflow.models.unilip.model import UniLIPModel

LATENT_CHANNELS = 16


def scenes_config(vocab_size: int, tokens: TokenIds) -> UniLIPConfig:
    """Sizes of the embedded model: 64 px pictures, 8 x 8 x 16 latents."""
    return UniLIPConfig(
        vision=VisionConfig(
            hidden_size=160,
            num_hidden_layers=4,
            num_attention_heads=5,
            intermediate_size=480,
            image_size=64,
            patch_size=8,
            shuffle=1,
            layer_norm_eps=1e-6,
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=10000.0,
            rms_norm_eps=1e-6,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        ),
        dit=SanaConfig(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=6,
            num_attention_heads=4,
            attention_head_dim=32,
            num_cross_attention_heads=4,
            cross_attention_head_dim=32,
            caption_channels=128,
            mlp_ratio=2.0,
            sample_size=8,
            norm_eps=1e-6,
            position_table=True,
            interpolation_scale=1.0,
        ),
        decoder=DecoderConfig(
            latent_channels=LATENT_CHANNELS,
            attention_head_dim=32,
            block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            block_out_channels=(24, 48, 96, 128),
            layers_per_block=(1, 1, 1, 1),
            qkv_multiscales=((), (), (), (5,)),
        ),
        tokens=tokens,
        n_query=16,
        connect_layer=2,
        unilip_factor=1.0,
        flow_shift=3.0,
        output_size=64,
        default_guidance_scale=1.5,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.25, 0.25, 0.25),
        system_message="",
        noise_dtype="float32",
    )


@torch.no_grad()
def initialize(model: UniLIPModel) -> None:
    """Set the parameters that a scenes model is trained from; PyTorch's defaults elsewhere."""
    embeddings = model.vision_tower.embeddings
    nn.init.trunc_normal_(embeddings.position_embedding, std=0.02)
    nn.init.trunc_normal_(embeddings.class_embedding, std=0.02)
    for block in model.dit.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].bias)
    nn.init.zeros_(model.dit.proj_out.weight)
    nn.init.zeros_(model.dit.proj_out.bias)


def scenes_model(vocab_size: int, tokens: TokenIds, seed: int = 0) -> UniLIPModel:
    """An untrained scenes model; the same for the same seed."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = UniLIPModel(scenes_config(vocab_size, tokens))
        initialize(model)
    finally:
        torch.random.set_rng_state(generator_state)
    return model
