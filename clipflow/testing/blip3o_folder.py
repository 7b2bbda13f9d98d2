"""A BLIP3-o folder of the published form: config.json, weights, tokenizer, pixel decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clipflow.errors import InputError
from clipflow.models.blip3o import BLIP3oConfig, BLIP3oModel, blip3o_config
from clipflow.models.blip3o.decoders import FOLDER as DECODER_FOLDER
from clipflow.models.blip3o.published import MODEL_TYPES
from clipflow.models.blip3o.sdxl_decoder import SDXLDecoder
from clipflow.models.folders.checkpoint import CONFIG_FILE, write_json
from clipflow.testing.folder_writing import PlannedWeights, Tensors, new_folder
from clipflow.testing.random_weights import DTYPES, RandomWeights
from clipflow.testing.tokenizer_files import SPECIAL, write_qwen_tokenizer

BLIP3O_SIZES = ("tiny", "4b", "8b")
# Qwen2.5-VL's special tokens and those that training added, in the order of their ids.
BLIP3O_SPECIAL = (*SPECIAL[:22], "[IMG]", "[/IMG]", "<image>")
# Beginnings of names in the files, by the transformers that wrote them; ours without.
NAMES = {
    "old": {"dit.": "model.dit.model.", "latent": "model.latent", "language_model.": "model."},
    "new": {
        "dit.": "model.dit.model.",
        "latent": "model.latent",
        "language_model.": "model.language_model.",
        "visual.": "model.visual.",
    },
}
UNET = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}
VAE = {
    "latent_channels": 4,
    "block_out_channels": (4, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 128,
    "scaling_factor": 0.13025,
}


def write_blip3o_folder(
    directory: str | Path,
    size: str = "tiny",
    seed: int = 0,
    *,
    decoder: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "2GB",
    names: str = "old",
    tokenizer: str = "fast",
    tied_head: bool | None = None,
    without: Sequence[str] = (),
    extra_tensors: Mapping[str, Sequence[int]] | None = None,
    changes: Mapping[str, object] | None = None,
    progress: bool | None = None,
) -> Path:
    """Write a BLIP3-o folder of the published form with random weights.

    The folder appears under its name when it is whole; an error leaves nothing.

    Args:
        directory: a folder that is not there yet, or empty.
        size: "tiny" (the form at small widths, 2 MB), "4b" (10 GB) or "8b" (19 GB).
        seed: the same gives the same bytes.
        decoder: with a `diffusion-decoder` of SDXL's form, which is small for all sizes and draws
            128 pixels.
        dtype: of all weights: float32, bfloat16 or float16.
        max_shard_size: of one weights file, as in `save_pretrained`.
        names: "old" as transformers up to 4.51 writes them, or "new".
        tokenizer: "slow" or "fast" files, see `write_tokenizer`.
        tied_head: leave the head out; the embeddings are it. As of the size when not given.
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
    config = _sized(size, tied_head)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in BLIP3oModel(config).state_dict().items()}
    own = {published_blip3o_name(name, names): name for name in shapes}
    planned: Tensors = {name: (shapes[own[name]], dtype) for name in own}
    planned |= {name: (tuple(shape), dtype) for name, shape in (extra_tensors or {}).items()}
    kept = {name: plan for name, plan in planned.items() if not name.startswith(tuple(without))}
    weights = PlannedWeights(kept, own, seed)
    values = published_blip3o_config(config, dtype) | dict(changes or {})
    with new_folder(directory, size, weights.nbytes) as folder:
        write_json(folder / CONFIG_FILE, {n: v for n, v in values.items() if v is not None})
        write_json(folder / "generation_config.json", _generation_config(config))
        write_json(folder / "preprocessor_config.json", _preprocessor(config))
        write_qwen_tokenizer(folder, BLIP3O_SPECIAL, first=config.tokens.pad, form=tokenizer)
        weights.write(folder, max_shard_size, progress)
        if decoder:
            _random_decoder(config, dtype, seed).save(folder / DECODER_FOLDER)
    return directory


def published_blip3o_name(own: str, names: str = "old") -> str:
    """The name in a published file of the parameter that is called `own` here.

    Raises:
        InputError: `names` is none of `NAMES`.
    """
    if names not in NAMES:
        raise InputError(f"names must be one of {', '.join(NAMES)}, got {names!r}")
    for begin, written in NAMES[names].items():
        if own.startswith(begin):
            return written + own.removeprefix(begin)
    return own


def published_blip3o_config(config: BLIP3oConfig, dtype: torch.dtype = torch.bfloat16) -> dict:
    """The config.json that a published folder of this model has."""
    text = dataclasses.asdict(config.text)
    section = list(text.pop("mrope_section"))
    vision = dataclasses.asdict(config.vision)
    del vision["image_size"]
    return {
        **text,
        "architectures": ["blip3oQwenForInferenceLM"],
        "attention_dropout": 0.0,
        "bos_token_id": config.tokens.pad,
        "eos_token_id": config.tokens.im_end,
        "freeze_mm_mlp_adapter": False,
        "gen_hidden_size": config.dit.in_channels,
        "gen_pooling": "early_pool2d_4",
        "gen_vision_tower": "eva-clip-E-14-plus",
        "hidden_act": "silu",
        "image_aspect_ratio": "square",
        "image_token_id": config.tokens.image_pad,
        "initializer_range": 0.02,
        "max_window_layers": config.text.num_hidden_layers,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "model_type": MODEL_TYPES[1],
        "n_query": config.n_query,
        "pad_token_id": config.tokens.pad,
        "rope_scaling": {"mrope_section": section, "rope_type": "default", "type": "default"},
        "sliding_window": None,
        "tokenizer_model_max_length": 512,
        "tokenizer_padding_side": "right",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.51.3",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "video_token_id": config.tokens.image_pad + 1,
        "vision_config": {
            **vision,
            "hidden_act": "silu",
            "in_chans": 3,
            "model_type": "qwen2_5_vl",
            "out_hidden_size": config.text.hidden_size,
            "spatial_patch_size": config.vision.patch_size,
            "tokens_per_second": 2,
        },
        "vision_end_token_id": config.tokens.vision_end,
        "vision_start_token_id": config.tokens.vision_start,
        "vision_token_id": config.tokens.vision_start + 2,
        "vision_tower_pretrained": None,
    }


def _sized(size: str, tied: bool | None) -> BLIP3oConfig:
    config = blip3o_config(size)
    if tied is None:
        return config
    return dataclasses.replace(
        config, text=dataclasses.replace(config.text, tie_word_embeddings=tied)
    )


def _random_decoder(config: BLIP3oConfig, dtype: torch.dtype, seed: int) -> SDXLDecoder:
    """A small decoder that reads features as wide as the DiT draws."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    width = config.dit.in_channels
    added = width + 6 * UNET["addition_time_embed_dim"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **UNET, cross_attention_dim=width, projection_class_embeddings_input_dim=added
        )
        found = SDXLDecoder(unet, AutoencoderKL(**VAE))
    weights = RandomWeights(seed)
    state = {
        name: weights.tensor(name, tuple(tensor.shape), dtype)
        for name, tensor in found.state_dict().items()
    }
    found.load_state_dict(state, assign=True)
    return found


def _generation_config(config: BLIP3oConfig) -> dict:
    return {
        "bos_token_id": config.tokens.pad,
        "do_sample": True,
        "eos_token_id": [config.tokens.im_end, config.tokens.pad],
        "pad_token_id": config.tokens.pad,
        "repetition_penalty": 1.05,
        "temperature": 1e-6,
        "transformers_version": "4.51.3",
    }


def _preprocessor(config: BLIP3oConfig) -> dict:
    return {
        "image_mean": list(config.image_mean),
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": list(config.image_std),
        "max_pixels": 12845056,
        "merge_size": config.vision.spatial_merge_size,
        "min_pixels": 3136,
        "patch_size": config.vision.patch_size,
        "processor_class": "Qwen2_5_VLProcessor",
        "temporal_patch_size": config.vision.temporal_patch_size,
    }
