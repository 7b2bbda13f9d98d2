"""Folders of an SDXL decoder: `unet/`, `vae/` and `scheduler/` as diffusers writes them.

    diffusion-decoder/
        model_index.json                   which class each part is of; only looked at
        unet/                              config.json, diffusion_pytorch_model.bf16.safetensors
        vae/                               the same
        scheduler/scheduler_config.json    SDXL-base's values where it is missing

Weights may be sharded, and have "bf16" in their files' names (which goes first) or not. Whatever
else is in the folder (the published ones bring a pipeline as a Python file) is never opened. Of the
autoencoder only the decoder is read (specs of BLIP3-o, sections A.8 and A.10).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from clipflow.models.blip3o.sdxl_config import (
    SDXL_SCHEDULER,
    build_part,
    check_depth,
    check_scheduler,
    check_unet,
    check_vae,
    read_settings,
)
from clipflow.models.folders.checkpoint import (
    Weights,
    check_shapes,
    listed,
    open_weights,
    read_json,
    sync,
    write_file,
    write_json,
)
from clipflow.models.folders.loading import DTYPES, read_weights

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model{variant}.safetensors"
WEIGHTS_INDEX = "diffusion_pytorch_model.safetensors.index{variant}.json"
VARIANTS = (".bf16", "")
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "scheduler": "EulerDiscreteScheduler",
}
SKIPPED = ("encoder.", "quant_conv.")
# Names of attention in autoencoders that were written before diffusers 0.18.
OLD_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


@dataclass(frozen=True)
class SDXLFolder:
    """What is in a folder, by its files' headers: everything is checked but the weights' values.

    Attributes:
        unet, vae: on the meta device; `vae` without its encoder.
        scheduler: settings of the noise schedule.
        weights: of "unet" and "vae".
        names: of "unet" and "vae": name in the module -> name in the files.
        folder: where it is.
    """

    unet: nn.Module
    vae: nn.Module
    scheduler: Mapping[str, object]
    weights: Mapping[str, Weights]
    names: Mapping[str, Mapping[str, str]]
    folder: Path

    @property
    def parameters(self) -> dict[str, int]:
        """How many parameters each part has, of those that are read."""
        return {
            part: sum(math.prod(self.weights[part].shapes[name]) for name in names.values())
            for part, names in self.names.items()
        }

    @property
    def dtypes(self) -> dict[str, tuple[torch.dtype, ...]]:
        """In which dtypes each part is stored."""
        found = {
            part: {self.weights[part].dtypes[name] for name in names.values()}
            for part, names in self.names.items()
        }
        return {part: tuple(sorted(dtypes, key=str)) for part, dtypes in found.items()}


def open_folder(folder: str | Path) -> SDXLFolder:
    """Check a folder by its settings and its files' headers.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a file is broken, a part is of another class, or settings and weights differ.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"load: the decoder must be a folder, got {str(folder)!r}")
    _check_index(folder / INDEX)
    unet, unet_weights, unet_names = _open_part(folder / "unet", UNet2DConditionModel, check_unet)
    vae, vae_weights, vae_names = _open_part(
        folder / "vae", AutoencoderKL, lambda vae, where: check_vae(vae, unet, where)
    )
    return SDXLFolder(
        unet,
        vae,
        read_scheduler(folder / "scheduler" / SCHEDULER_CONFIG),
        {"unet": unet_weights, "vae": vae_weights},
        {"unet": unet_names, "vae": vae_names},
        folder,
    )


def read_scheduler(path: Path) -> dict[str, object]:
    """Settings of the noise schedule; SDXL-base's where there is no such file.

    Raises:
        ValueError: it is of another class, or has settings that mean nothing.
    """
    from diffusers import EulerDiscreteScheduler

    if not path.exists():
        return dict(SDXL_SCHEDULER)
    settings = read_settings(path, EulerDiscreteScheduler)
    check_scheduler(settings, str(path))
    return settings


def load_parts(
    found: SDXLFolder, *, dtype: torch.dtype | None, device: torch.device | str
) -> tuple[nn.Module, nn.Module]:
    """Give UNet and VAE their weights, which are in memory once; (unet, vae).

    Raises:
        ValueError: a weight is not finite.
    """
    for part, module in (("unet", found.unet), ("vae", found.vae)):
        wanted = vae_dtype(found.vae, dtype) if part == "vae" else dtype
        where = str(found.folder / part)
        names, weights = found.names[part], found.weights[part]
        read_weights(module, weights, names, where, dtype=wanted, device=device)
    return found.unet, found.vae


def vae_dtype(vae: nn.Module, dtype: torch.dtype | None) -> torch.dtype | None:
    """float32 where float16 is wanted of an autoencoder that says it overflows there."""
    return torch.float32 if dtype is torch.float16 and vae.config.force_upcast else dtype


def without_encoder(vae: nn.Module) -> nn.Module:
    """`vae` with its decoder alone; pictures are drawn one by one, which takes less memory."""
    vae.encoder, vae.quant_conv = None, None
    vae.enable_slicing()
    return vae


def save_parts(
    folder: Path, unet: nn.Module, vae: nn.Module, scheduler: Mapping[str, object]
) -> None:
    """Write a folder of the form above, in place of the one that is there.

    Everything is written and synced beside `folder` first: an error leaves it as it was. A crash
    within the moves leaves it without a part, which does not load.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save: the decoder must be a folder, got the file {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
    try:
        _write_part(staging / "unet", unet)
        _write_part(staging / "vae", vae)
        (staging / "scheduler").mkdir()
        named = {"_class_name": CLASSES["scheduler"], **scheduler}
        write_json(staging / "scheduler" / SCHEDULER_CONFIG, named)
        parts = {part: ["diffusers", name] for part, name in CLASSES.items()}
        write_json(staging / INDEX, {"_class_name": "DiffusionPipeline", **parts})
        for path in (*staging.rglob("*"), staging):
            sync(path)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    for part in CLASSES:
        if (folder / part).is_dir():
            shutil.rmtree(folder / part)
        os.replace(staging / part, folder / part)
    os.replace(staging / INDEX, folder / INDEX)
    sync(folder)


def _write_part(folder: Path, module: nn.Module) -> None:
    folder.mkdir()
    state = module.state_dict()
    narrow = all(tensor.dtype is torch.bfloat16 for tensor in state.values())
    name = WEIGHTS.format(variant=VARIANTS[0] if narrow else "")
    write_file(folder / name, {key: tensor.detach().cpu() for key, tensor in state.items()})
    settings = {key: value for key, value in module.config.items() if not key.startswith("_")}
    settings = json.loads(json.dumps(settings))
    write_json(folder / CONFIG, {"_class_name": type(module).__name__, **settings})


def _check_index(path: Path) -> None:
    """Refuse a folder whose parts are of other classes than ours; the file may be missing."""
    if not path.exists():
        return
    values = read_json(path)
    for part, name in CLASSES.items():
        if part in values and values[part] != ["diffusers", name]:
            raise ValueError(
                f"load: {path} must have a {part} of diffusers' {name}, "
                f"got {repr(values[part])[:80]}"
            )


def _open_part(
    folder: Path, cls: type[nn.Module], check: Callable[[nn.Module, str], None]
) -> tuple[nn.Module, Weights, dict[str, str]]:
    """(the module on the meta device, its weights, its names -> names in the files)."""
    config, weights = folder / CONFIG, _open_weights(folder)
    settings = read_settings(config, cls)
    names = _names(weights, cls)
    check_depth(settings, len(weights.shapes), str(config))
    module = build_part(cls, settings, str(config))
    check(module, str(config))
    if cls.__name__ == CLASSES["vae"]:
        without_encoder(module)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_shapes(wanted, {own: weights.shapes[name] for own, name in names.items()}, str(folder))
    wrong = [name for name in names.values() if weights.dtypes[name] not in DTYPES]
    if wrong:
        raise ValueError(
            f"load: {folder} must hold weights of float32, bfloat16 or float16, got others in "
            + listed(wrong)
        )
    return module, weights, names


def _open_weights(folder: Path) -> Weights:
    if not folder.is_dir():
        raise FileNotFoundError(f"load: {folder} must be there, got no such folder")
    for variant in VARIANTS:
        file, index = WEIGHTS.format(variant=variant), WEIGHTS_INDEX.format(variant=variant)
        if (folder / file).exists() or (folder / index).exists():
            return open_weights(folder, weights_file=file, index_file=index)
    wanted = [WEIGHTS.format(variant=variant) for variant in VARIANTS]
    found = sorted(path.name for path in folder.iterdir()) or ["nothing"]
    raise FileNotFoundError(f"load: {folder} must hold {' or '.join(wanted)}, got {listed(found)}")


def _names(weights: Weights, cls: type[nn.Module]) -> dict[str, str]:
    """Name in the module -> name in the files, without what is not read."""
    if cls.__name__ != CLASSES["vae"]:
        return {name: name for name in weights.shapes}
    names: dict[str, str] = {}
    for name in weights.shapes:
        if name.startswith(SKIPPED):
            continue
        *front, last, kind = name.split(".")
        attention = "attentions" in front and last in OLD_ATTENTION
        own = ".".join([*front, OLD_ATTENTION[last], kind]) if attention else name
        if own in names:
            raise ValueError(
                f"load: every weight must be there once, got {names[own]!r} and {name!r}"
            )
        names[own] = name
    return names
