"""The sizes that can be written, and config.json as the published folders have it.

Source: the fields that UniLIP's training code writes (transformers 4.52.1). Widths of the DiT and
the pixel decoder are not among them; a loader has to read those from the tensors.
"""

from __future__ import annotations

import dataclasses

import torch

from clipflow.errors import InputError
from clipflow.models.unilip.config import TextConfig, TokenIds, UniLIPConfig, VisionConfig
from clipflow.models.unilip.published import MODEL_TYPE, unilip_1b_config, unilip_3b_config

SIZES = ("tiny", "1b", "3b")
# Rows of the published embeddings: InternVL3's 151674, and three tokens that training added.
PUBLISHED_ROWS = 151677
TINY_ROWS = 320
PAD_BEFORE_IMAGE_TOKEN = 24

# Width of the language model -> where the authors' folders say that its parts came from.
ORIGINS = {
    896: ("OpenGVLab/InternVL3-1B", "Efficient-Large-Model/Sana_600M_512px_diffusers"),
    1536: ("OpenGVLab/InternVL3-2B", "Efficient-Large-Model/Sana_1600M_512px_diffusers"),
}
DECODER_ORIGIN = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"


def size_config(size: str, *, vocab_size: int | None = None, tied: bool = False) -> UniLIPConfig:
    """The configuration of "tiny", "1b" or "3b".

    "tiny" has the published form at small widths: 448 px, 256 image tokens, 16 x 16 latents.

    Args:
        size: one of `SIZES`.
        vocab_size: rows of the embeddings; those of the published folders when not given.
        tied: whether the language model's head is its embeddings.

    Raises:
        InputError: no such size.
    """
    if size not in SIZES:
        raise InputError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    config = {"tiny": _tiny_config, "1b": unilip_1b_config, "3b": unilip_3b_config}[size]()
    rows = vocab_size or (TINY_ROWS if size == "tiny" else PUBLISHED_ROWS)
    text = dataclasses.replace(config.text, vocab_size=rows, tie_word_embeddings=tied)
    return dataclasses.replace(config, text=text)


def published_config(config: UniLIPConfig, dtype: torch.dtype = torch.bfloat16) -> dict:
    """The config.json that a published folder of this model has.

    Args:
        config: the model.
        dtype: what the file says the weights are.

    Returns:
        Plain JSON values. `*_path` values name what training began with; nothing is there.
    """
    language, transformer = ORIGINS.get(
        config.text.hidden_size, ("/mnt/train/InternVL3-tiny", "/mnt/train/Sana-tiny")
    )
    return {
        "architectures": ["UniLIP_InternVLForCausalLM"],
        "connect_layer": config.connect_layer,
        "dit_path": transformer,
        "downsample_ratio": 1 / config.vision.shuffle,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "square",
        "image_seq_length": config.latent_side**2,
        "image_token_id": config.tokens.img_context,
        "mllm_hf_path": f"{language}-hf",
        "mllm_path": language,
        "mm_projector_lr": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "model_type": MODEL_TYPE,
        "n_query": config.n_query,
        "pad_token_id": config.tokens.pad,
        "projector_hidden_act": "gelu",
        "text_config": _text_config(config.text, dtype),
        "tokenizer_model_max_length": 1024,
        "tokenizer_padding_side": "right",
        "torch_dtype": _name(dtype),
        "transformers_version": "4.52.1",
        "tune_mm_mlp_adapter": False,
        "unilip_factor": config.unilip_factor,
        "use_cache": True,
        "vae_path": DECODER_ORIGIN,
        "vision_config": _vision_config(config.vision, dtype),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def _tiny_config() -> UniLIPConfig:
    full = unilip_1b_config()
    return dataclasses.replace(
        full,
        vision=dataclasses.replace(
            full.vision,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
        ),
        text=dataclasses.replace(
            full.text,
            vocab_size=TINY_ROWS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        dit=dataclasses.replace(
            full.dit,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=32,
            caption_channels=48,
        ),
        decoder=dataclasses.replace(
            full.decoder,
            block_out_channels=(32, 32, 64, 64, 64, 64),
            layers_per_block=(1,) * 6,
        ),
        tokens=_tokens(image_token_id=303),
        n_query=16,
        connect_layer=2,
    )


def _tokens(image_token_id: int) -> TokenIds:
    pad = image_token_id - PAD_BEFORE_IMAGE_TOKEN
    return TokenIds(
        pad=pad,
        img_start=image_token_id - 2,
        img_end=image_token_id - 1,
        img_context=image_token_id,
        im_end=pad + 2,
    )


def _text_config(text: TextConfig, dtype: torch.dtype) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "max_window_layers": text.num_hidden_layers,
        "model_type": "qwen2",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        # No effect below max_position_embeddings.
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": text.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": _name(dtype),
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": text.vocab_size,
    }


def _vision_config(vision: VisionConfig, dtype: torch.dtype) -> dict:
    return {
        "architectures": ["InternVisionModel"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": vision.hidden_size,
        "image_size": [vision.image_size] * 2,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "layer_scale_init_value": 0.1,
        "model_type": "internvl_vision",
        "norm_type": "layer_norm",
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_hidden_layers,
        "patch_size": [vision.patch_size] * 2,
        "projection_dropout": 0.0,
        "torch_dtype": _name(dtype),
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": False,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
