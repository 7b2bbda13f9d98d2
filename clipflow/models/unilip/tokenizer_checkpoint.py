"""UniLIP's tokenizer checkpoints: flat files under names of their own (specs section 5.2).

They become a folder of an `ImageTokenizer`, or take the place of the same parts of a whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipflow.errors import InputError
from clipflow.models.dc_ae.shapes import decoder_config
from clipflow.models.folders.checkpoint import check_shapes, listed
from clipflow.models.folders.conversion import (
    MAX_SHARD_BYTES,
    Checkpoint,
    check_output,
    companions_of,
    open_checkpoint,
    write_model_folder,
)
from clipflow.models.folders.loading import load_config
from clipflow.models.folders.shapes import Shapes
from clipflow.models.unilip.image_codec import PARTS, ImageTokenizer, TokenizerConfig
from clipflow.models.unilip.keys import own_name
from clipflow.models.unilip.loading import FORMAT
from clipflow.models.unilip.published import DECODER, IMAGENET_MEAN, IMAGENET_STD
from clipflow.models.unilip.published_shapes import vision_config

# (prefix in the file, our prefix); they exclude each other.
PREFIXES = (
    ("encoder.", "vision_tower."),
    ("mlp1.", "multi_modal_projector."),
    ("down_blocks.", "vae_decoder.down_blocks."),
    ("down_mlp.", "vae_decoder.down_mlp."),
    ("decoder.", "vae_decoder.decoder."),
)
# Of a part that was trained along and is not used.
IGNORED = "regressor"
ALWAYS_WIDE = "vae_decoder."


@dataclass(frozen=True)
class TokenizerTensors:
    """A tokenizer checkpoint, checked.

    Attributes:
        checkpoint: the file.
        config: sizes, from the shapes.
        names: our name -> name in the file.
        ignored: names of what is left out.
    """

    checkpoint: Checkpoint
    config: TokenizerConfig
    names: Mapping[str, str]
    ignored: tuple[str, ...]

    def spec(self, own: str) -> Tensor:
        return self.checkpoint.specs[self.names[own]]

    def read(self, own: str) -> Tensor:
        return self.checkpoint.read(self.names[own])


def open_tokenizer(source: Path, *, key: str | None = None) -> TokenizerTensors:
    """The tensors of a tokenizer checkpoint.

    Args:
        source: a file, as of `open_checkpoint`.
        key: the entry of a pickle that holds the tensors.

    Raises:
        InputError: it is none, or holds other names or shapes; one error counts the differences and
            lists the first 10.
    """
    checkpoint = open_checkpoint(source, key=key)
    found = {name: spec.shape for name, spec in checkpoint.specs.items() if IGNORED not in name}
    names = {_own(name): name for name in found}
    try:
        unknown = [name for own, name in names.items() if own == name]
        if unknown:
            raise ValueError(f"got {len(unknown)} unknown names: {listed(unknown)}")
        config = config_from_shapes({own: found[name] for own, name in names.items()})
        with torch.device("meta"):
            state = ImageTokenizer(config).state_dict()
        wanted = {_in_file(own): tuple(tensor.shape) for own, tensor in state.items()}
        check_shapes(wanted, found, "it")
    except ValueError as error:
        text = str(error).removeprefix("load: ")
        raise InputError(f"{source}: must be a tokenizer checkpoint of UniLIP; {text}") from error
    narrow = [n for n in found if not checkpoint.specs[n].dtype.is_floating_point]
    if narrow:
        raise InputError(f"{source}: tensors must be of floating point, got {listed(narrow)}")
    ignored = tuple(name for name in checkpoint.specs if name not in found)
    return TokenizerTensors(checkpoint, config, {own: names[own] for own in state}, ignored)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> TokenizerConfig:
    """The sizes of a tokenizer with tensors of these shapes, under our names.

    Raises:
        ValueError: a tensor that tells a size is missing, or the vision tower's width is unknown.
    """
    tensors = Shapes(shapes, "UniLIP")
    vision = vision_config(tensors)
    return TokenizerConfig(
        vision=vision,
        decoder=decoder_config(tensors, DECODER),
        text_width=tensors.of("multi_modal_projector.1.weight", 2)[0],
        output_size=vision.image_size,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )


def convert_tokenizer(
    source: Path,
    out: Path,
    *,
    base: Path | None = None,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    progress: bool = False,
) -> TokenizerTensors:
    """Make a folder of a tokenizer checkpoint.

    Args:
        source: the checkpoint, as of `open_tokenizer`.
        out: the folder: of the tokenizer alone, or of a whole model if there is a `base`.
        base: folder of a whole model, of which `out` is a copy but for the parts that the
            checkpoint has. Vision tower and projector take its dtypes; the decoder keeps its own.
        key: the entry of a pickle that holds the tensors.
        dtype: of vision tower and projector, without a `base`; as they are when not given.
        max_shard_bytes: of each file.
        force: replace what is there.
        progress: show a bar, on a terminal.

    Returns:
        The checkpoint that was read.

    Raises:
        InputError: `source` is no tokenizer checkpoint or does not fit to `base`, `out` is there,
            or the disk is full; nothing is left behind.
    """
    if out.suffix == ".safetensors":
        raise InputError(f"{out}: must be a folder for a tokenizer, got a file")
    check_output(out, force=force)
    tokenizer = open_tokenizer(source, key=key)
    options = {"max_shard_bytes": max_shard_bytes, "progress": progress}
    if base is not None:
        _replace_parts(base, tokenizer, out, **options)
        return tokenizer
    specs = {}
    for own in tokenizer.names:
        spec = tokenizer.spec(own)
        wide = dtype is None or own.startswith(ALWAYS_WIDE)
        specs[own] = spec if wide else spec.to(dtype)
    write_model_folder(
        out,
        specs,
        tokenizer.read,
        config=tokenizer.config.to_dict(),
        companions=[],
        release=tokenizer.checkpoint.release,
        **options,
    )
    return tokenizer


def _replace_parts(
    base: Path, tokenizer: TokenizerTensors, out: Path, *, max_shard_bytes: int, progress: bool
) -> None:
    try:
        load_config(base, FORMAT)
        whole = open_checkpoint(base)
        owns = {name: own_name(name) for name in whole.specs}
        replaced = {name: own for name, own in owns.items() if own.split(".")[0] in PARTS}
        wanted = {own: whole.specs[name].shape for name, own in replaced.items()}
        check_shapes(
            wanted, {own: tokenizer.spec(own).shape for own in tokenizer.names}, "the file"
        )
    except (ValueError, OSError) as error:
        text = str(error).removeprefix("load: ")
        raise InputError(f"--base {base}: must be a model that the file fits to; {text}") from error

    def read(name: str) -> Tensor:
        return tokenizer.read(replaced[name]) if name in replaced else whole.read(name)

    def release() -> None:
        whole.release()
        tokenizer.checkpoint.release()

    specs = dict(whole.specs)
    for name, own in replaced.items():
        if own.startswith(ALWAYS_WIDE):
            specs[name] = tokenizer.spec(own)
    write_model_folder(
        out,
        specs,
        read,
        companions=companions_of(base),
        release=release,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def _own(name: str) -> str:
    """Our name of a tensor in the file; the same where there is none."""
    return _renamed(name, PREFIXES)


def _in_file(own: str) -> str:
    return _renamed(own, ((ours, found) for found, ours in PREFIXES))


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
