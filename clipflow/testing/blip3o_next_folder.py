"""A BLIP3o-NEXT folder of the published form: config.json, weights, tokenizer files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clipflow.errors import InputError
from clipflow.models.blip3o_next import BLIP3oNextConfig, BLIP3oNextModel
from clipflow.models.blip3o_next.config import Qwen3TextConfig, TokenIds
from clipflow.models.blip3o_next.keys import SANA_FOLDER
from clipflow.models.blip3o_next.published import (
    LATENT_SIDE,
    SCALING_FACTOR,
    SYSTEM_MESSAGE,
    TOKENS_PER_IMAGE,
)
from clipflow.models.dc_ae.config import DecoderConfig
from clipflow.models.dits.sana import SanaConfig
from clipflow.models.folders.checkpoint import CONFIG_FILE, write_json
from clipflow.testing.folder_writing import PlannedWeights, new_folder
from clipflow.testing.random_weights import DTYPES
from clipflow.testing.tokenizer_files import FIRST, write_qwen_tokenizer

NEXT_SIZES = ("tiny", "3b")
# Qwen3's, in the order of their ids; the image vocabulary follows.
QWEN3_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
SCALES = 3
# What Qwen3's own template makes of messages that only say something.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Beginnings of names in the files; ours without the leading parts.
PUBLISHED = {"language_model.": "model.", "dit.": "model.sana.", "vae.": "model.sana_vae."}


def next_config(size: str, *, tied: bool = True) -> BLIP3oNextConfig:
    """The configuration of "tiny" or "3b"; takes no memory.

    "tiny" has the published form at small widths: 729 tokens of 64, 32 x 32 latents, 1024 px. "3b"
    is Qwen3-1.7B with SANA-1.5 of 1.6 billion parameters.

    Raises:
        InputError: no such size.
    """
    if size not in NEXT_SIZES:
        raise InputError(f"size must be one of {', '.join(NEXT_SIZES)}, got {size!r}")
    tiny = size == "tiny"
    tokens = _token_ids(FIRST if tiny else 151643, 64 if tiny else 65536)
    text = Qwen3TextConfig(
        vocab_size=tokens.first_image + tokens.image_count,
        hidden_size=64 if tiny else 2048,
        intermediate_size=128 if tiny else 6144,
        num_hidden_layers=2 if tiny else 28,
        num_attention_heads=4 if tiny else 16,
        num_key_value_heads=2 if tiny else 8,
        head_dim=32 if tiny else 128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )
    decoder = DecoderConfig(
        latent_channels=32,
        attention_head_dim=32,
        block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        block_out_channels=(32, 32, 64, 64, 64, 64) if tiny else (128, 256, 512, 512, 1024, 1024),
        layers_per_block=(1 if tiny else 3,) * 6,
        qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    )
    return BLIP3oNextConfig(
        text=text,
        dit=_sana(tiny),
        decoder=decoder,
        tokens=tokens,
        tokens_per_image=TOKENS_PER_IMAGE,
        scaling_factor=SCALING_FACTOR,
        flow_shift=1.0,
        default_guidance_scale=2.0,
        default_steps=30,
        output_size=LATENT_SIDE * decoder.upscale,
        system_message=SYSTEM_MESSAGE,
        noise_dtype="bfloat16",
    )


def write_blip3o_next_folder(
    directory: str | Path,
    size: str = "tiny",
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "2GB",
    tokenizer: str = "fast",
    tied_head: bool = True,
    without: Sequence[str] = (),
    extra_tensors: Mapping[str, Sequence[int]] | None = None,
    changes: Mapping[str, object] | None = None,
    progress: bool | None = None,
) -> Path:
    """Write a BLIP3o-NEXT folder of the published form with random weights.

    The folder appears under its name when it is whole; an error leaves nothing.

    Args:
        directory: a folder that is not there yet, or empty.
        size: "tiny" (the form at small widths, 2 MB) or "3b" (7 GB).
        seed: the same gives the same bytes.
        dtype: of all weights: float32, bfloat16 or float16.
        max_shard_size: of one weights file, as in `save_pretrained`.
        tokenizer: "slow" or "fast" files, see `write_tokenizer`.
        tied_head: leave the head out; the embeddings are it.
        without: beginnings of names in the file that are left out.
        extra_tensors: name in the file -> shape of tensors that drawing has no use for.
        changes: fields of config.json; None leaves one out.
        progress: show a bar; from 0.25 GB on when not given.

    Returns:
        The folder.

    Raises:
        InputError: the folder is not empty, an argument cannot be, or the disk has not the room.
        OSError: the files cannot be written.
    """
    directory = Path(directory).expanduser()
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    config = next_config(size, tied=tied_head)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in BLIP3oNextModel(config).state_dict().items()}
    names = {published_name(own): own for own in shapes}
    planned = {name: (shapes[own], dtype) for name, own in names.items()}
    planned |= {name: (tuple(shape), dtype) for name, shape in (extra_tensors or {}).items()}
    kept = {name: plan for name, plan in planned.items() if not name.startswith(tuple(without))}
    weights = PlannedWeights(kept, names, seed)
    values = published_next_config(config, dtype) | dict(changes or {})
    with new_folder(directory, size, weights.nbytes) as folder:
        write_json(folder / CONFIG_FILE, {n: v for n, v in values.items() if v is not None})
        write_qwen_tokenizer(
            folder,
            special_tokens(config.tokens.image_count),
            first=config.tokens.image_start - len(QWEN3_SPECIAL),
            form=tokenizer,
            chat_template=CHAT_TEMPLATE,
        )
        weights.write(folder, max_shard_size, progress)
    return directory


def published_name(own: str) -> str:
    """The name in a published file of the parameter that is called `own` here."""
    for begin, written in PUBLISHED.items():
        if own.startswith(begin):
            return written + own.removeprefix(begin)
    return own if own.startswith("lm_head.") else f"model.{own}"


def published_next_config(config: BLIP3oNextConfig, dtype: torch.dtype = torch.bfloat16) -> dict:
    """The config.json that a published folder of this model has."""
    text, tokens = dataclasses.asdict(config.text), config.tokens
    return {
        **text,
        "architectures": ["blip3oQwenForInferenceLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokens.pad,
        "delay_load": True,
        "diffusion_name_or_path": SANA_FOLDER,
        "eos_token_id": tokens.eos[0],
        "hidden_act": "silu",
        "image_end_tag_id": tokens.image_end,
        "image_end_token_id": tokens.first_image + tokens.image_count - 1,
        "image_start_tag_id": tokens.image_start,
        "image_start_token_id": tokens.first_image,
        "initializer_range": 0.02,
        "max_window_layers": config.text.num_hidden_layers,
        "mm_patch_merge_type": "flat",
        "mm_tunable_parts": "mm_language_model",
        "mm_use_im_start_end": False,
        "model_type": "blip3o_qwen_inference",
        "num_image_tokens": tokens.image_count,
        "num_new_tokens": 2 + SCALES + tokens.image_count,
        "num_scale_tokens": SCALES,
        "pos_skipping_range": 4096,
        "rope_scaling": None,
        "scale_end_token_id": tokens.scale + SCALES - 1,
        "scale_start_token_id": tokens.scale,
        "sliding_window": None,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.51.3",
        "use_cache": True,
        "use_pos_skipping": False,
        "use_sliding_window": False,
    }


def special_tokens(image_tokens: int) -> list[str]:
    """Qwen3's special tokens and the image vocabulary, in the order of their ids."""
    scales = [f"<S{number}>" for number in range(SCALES)]
    images = [f"<I{number}>" for number in range(image_tokens)]
    return [*QWEN3_SPECIAL, "<im_start>", "<im_end>", *scales, *images]


def _token_ids(first: int, image_tokens: int) -> TokenIds:
    """`first` is the id of <|endoftext|>."""
    tag = first + len(QWEN3_SPECIAL)
    return TokenIds(
        pad=first,
        image_start=tag,
        image_end=tag + 1,
        scale=tag + 2,
        first_image=tag + 2 + SCALES,
        image_count=image_tokens,
        eos=(first + QWEN3_SPECIAL.index("<|im_end|>"),),
    )


def _sana(tiny: bool) -> SanaConfig:
    return SanaConfig(
        in_channels=32,
        out_channels=32,
        num_layers=2 if tiny else 20,
        num_attention_heads=4 if tiny else 70,
        attention_head_dim=16 if tiny else 32,
        num_cross_attention_heads=2 if tiny else 20,
        cross_attention_head_dim=32 if tiny else 112,
        caption_channels=48 if tiny else 2304,
        mlp_ratio=2.5,
        sample_size=LATENT_SIDE,
        norm_eps=1e-6,
        position_table=False,
        interpolation_scale=1.0,
        qk_norm="rms_norm_across_heads",
    )
