"""A tiny BLIP3-o with random weights that reads bytes: any text, pictures of any shape."""

import torch
from tiny_chat import byte_tokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from clipflow.models.blip3o import BLIP3oConfig, BLIP3oModel
from clipflow.models.blip3o.config import MultimodalTextConfig, TokenIds, VisionConfig
from clipflow.models.blip3o.eva import CLIP_MEAN, CLIP_STD
from clipflow.models.dits.lumina import LuminaConfig

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "[IMG]",
)
SYSTEM = "You are a helpful assistant."


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and Qwen2.5-VL's and BLIP3-o's special ones."""
    return byte_tokenizer(SPECIAL)


def tiny_qwen_config(*, tied: bool = False, positions: int = 2048) -> BLIP3oConfig:
    """Two blocks of vision, the second with full attention, and three layers of language."""
    tokenizer = qwen_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
    names = ("pad", "", "im_end", "vision_start", "vision_end", "image_pad", "image_start")
    return BLIP3oConfig(
        vision=VisionConfig(
            hidden_size=32,
            depth=2,
            num_heads=2,
            intermediate_size=48,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=56,
            fullatt_block_indexes=(1,),
            image_size=56,
        ),
        text=MultimodalTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=1e4,
            rms_norm_eps=1e-6,
            max_position_embeddings=positions,
            tie_word_embeddings=tied,
            mrope_section=(2, 3, 3),
        ),
        dit=LuminaConfig(
            in_channels=16,
            hidden_size=32,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            intermediate_size=64,
            condition_channels=64,
            patch_size=1,
            norm_eps=1e-5,
            rope_theta=1e4,
        ),
        tokens=TokenIds(**{name: own for name, own in zip(names, ids, strict=True) if name}),
        target=None,
        n_query=4,
        latent_side=2,
        flow_shift=1.0,
        default_guidance_scale=3.0,
        default_steps=2,
        output_size=32,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        system_message=SYSTEM,
        noise_dtype="float32",
    )


def tiny_qwen(*, seed: int = 0, tied: bool = False) -> BLIP3oModel:
    """A model whose answers depend on what is asked and shown."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = BLIP3oModel(tiny_qwen_config(tied=tied))
    torch.random.set_rng_state(state)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Else answers would be one token over and over.
        model.language_model.embed_tokens.weight.normal_(std=0.3, generator=dice)
        model.visual.merger.mlp[2].weight.normal_(std=0.3, generator=dice)
        model.language_model.norm.weight[::2] = -1
        for layer in model.language_model.layers:
            attention = layer.self_attn
            for part in (attention.q_proj, attention.k_proj):
                part.weight.normal_(std=0.6, generator=dice)
            for part in (attention.v_proj, attention.o_proj, layer.mlp.down_proj):
                part.weight.normal_(std=0.2, generator=dice)
    return model.requires_grad_(False).eval()


def transformers_qwen(model: BLIP3oModel) -> Qwen2_5_VLForConditionalGeneration:
    """Transformers' model with the sizes and the weights of ours."""
    tokens = model.config.tokens
    other = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=model.language_model.config.to_dict(),
            vision_config=model.visual.config.to_dict(),
            image_token_id=tokens.image_pad,
            video_token_id=tokens.image_start,  # there are no videos
            vision_start_token_id=tokens.vision_start,
            vision_end_token_id=tokens.vision_end,
            tie_word_embeddings=model.lm_head is None,
        )
    )
    other.model.visual.load_state_dict(model.visual.state_dict())
    other.model.language_model.load_state_dict(model.language_model.state_dict())
    head = model.language_model.embed_tokens if model.lm_head is None else model.lm_head
    other.lm_head.weight.data = head.weight.data
    return other.requires_grad_(False).eval()
