"""A whole folder of the published form: config.json, weights, tokenizer files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clipflow.errors import InputError
from clipflow.models.folders.checkpoint import CONFIG_FILE, write_json
from clipflow.models.unilip import UniLIPConfig, UniLIPModel
from clipflow.testing.folder_writing import PlannedWeights, Tensors, new_folder
from clipflow.testing.published_config import published_config, size_config
from clipflow.testing.random_weights import DTYPES
from clipflow.testing.tokenizer_files import FORMS, write_tokenizer

DECODER = "vae_decoder."
# How names in a file begin instead of with "model." where transformers maps them back.
PREFIXES = ("in_memory", "reverse_mapped")
REVERSE = {
    "language_model.": "language_model.model.",
    "vision_tower.": "vision_tower.",
    "multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def write_unilip_folder(
    directory: str | Path,
    size: str = "tiny",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    *,
    max_shard_size: int | str = "2GB",
    prefixes: str = "in_memory",
    tokenizer: str = "slow",
    tied_head: bool = False,
    vocab_size: int | None = None,
    decoder_dtype: torch.dtype | None = None,
    extra_tensors: Mapping[str, Sequence[int]] | None = None,
    preprocessor: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write a UniLIP folder of the published form with random weights.

    Of 3.6 GB ("1b") or 8.3 GB ("3b") of bfloat16, memory holds one weights file at a time. The
    folder appears under its name when it is whole; an error leaves nothing.

    Args:
        directory: a folder that is not there yet, or empty.
        size: "tiny" (the form at small widths, 2.5 MB), "1b" or "3b".
        dtype: of all weights: float32, bfloat16 or float16.
        seed: the same gives the same bytes.
        max_shard_size: of one weights file, as in `save_pretrained`; more makes several files and
            an index.
        prefixes: "in_memory" begins names with "model."; "reverse_mapped" has the names that
            later versions of transformers write.
        tokenizer: "slow" or "fast" files, see `write_tokenizer`.
        tied_head: leave the head out; the embeddings are it.
        vocab_size: rows of the embeddings; 151677, and 320 for "tiny", when not given.
        decoder_dtype: of the pixel decoder and clip_down, if another.
        extra_tensors: name in the file -> shape of tensors that the model has no use for.
        preprocessor: write InternVL3's preprocessor_config.json, too.
        progress: show a bar; from 0.25 GB on when not given.

    Returns:
        The folder.

    Raises:
        InputError: the folder is not empty, an argument cannot be, or the disk has not the room.
        OSError: the files cannot be written.
    """
    directory = Path(directory).expanduser()
    if tokenizer not in FORMS:
        raise InputError(f"tokenizer must be one of {', '.join(FORMS)}, got {tokenizer!r}")
    config = size_config(size, vocab_size=vocab_size, tied=tied_head)
    tensors = plan_tensors(config, dtype, decoder_dtype=decoder_dtype)
    names = {published_name(own, prefixes): own for own in tensors}
    planned = {name: tensors[own] for name, own in names.items()}
    for name, shape in (extra_tensors or {}).items():
        planned[name] = (tuple(shape), dtype)
    weights = PlannedWeights(planned, names, seed)
    with new_folder(directory, size, weights.nbytes) as folder:
        write_json(folder / CONFIG_FILE, published_config(config, dtype))
        write_tokenizer(folder, image_token_id=config.tokens.img_context, form=tokenizer)
        if preprocessor:
            write_json(folder / "preprocessor_config.json", _preprocessor(config))
        weights.write(folder, max_shard_size, progress)
    return directory


def plan_tensors(
    config: UniLIPConfig, dtype: torch.dtype, *, decoder_dtype: torch.dtype | None = None
) -> Tensors:
    """Every tensor of the model under our names, with shape and dtype; takes no memory.

    Raises:
        InputError: a dtype that is none of float32, bfloat16 and float16.
    """
    for found in (dtype, decoder_dtype or dtype):
        if found not in DTYPES:
            wanted = ", ".join(str(known) for known in DTYPES)
            raise InputError(f"dtype must be one of {wanted}, got {found}")
    with torch.device("meta"):
        model = UniLIPModel(config)
    return {
        name: (
            tuple(tensor.shape),
            (decoder_dtype or dtype) if name.startswith(DECODER) else dtype,
        )
        for name, tensor in model.state_dict().items()
    }


def published_name(own: str, prefixes: str = "in_memory") -> str:
    """The name in a published file of the parameter that is called `own` here.

    Raises:
        InputError: `prefixes` is none of `PREFIXES`.
    """
    if prefixes not in PREFIXES:
        raise InputError(f"prefixes must be one of {', '.join(PREFIXES)}, got {prefixes!r}")
    if prefixes == "reverse_mapped":
        for begin, written in REVERSE.items():
            if own.startswith(begin):
                return written + own.removeprefix(begin)
    return own if own.startswith("lm_head.") else f"model.{own}"


def _preprocessor(config: UniLIPConfig) -> dict:
    return {
        "crop_to_patches": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.image_mean),
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "image_std": list(config.image_std),
        "max_patches": 12,
        "min_patches": 1,
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": config.image_size, "width": config.image_size},
    }
