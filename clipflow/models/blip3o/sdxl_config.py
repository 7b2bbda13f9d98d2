"""The settings of the SDXL decoder's parts: strictly read, and parts of their sizes on "meta".

A settings file says sizes and nothing else: it names no file, no class but the one expected, and no
code (specs of BLIP3-o, section A.8).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from clipflow.models.folders.checkpoint import read_json

# SDXL-base's noise schedule, for a folder without one: the published folder's is not known here.
SDXL_SCHEDULER: dict[str, object] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
# Settings of other schedulers and of training, which stay in files and mean nothing to these parts.
LEFTOVERS = frozenset({
    "clip_sample", "clip_sample_range", "sample_max_value", "set_alpha_to_one", "skip_prk_steps",
    "thresholding", "dynamic_thresholding_ratio", "variance_type",
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
    "use_ema_warmup",
})  # fmt: skip
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
FLAGS = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "rescale_betas_zero_snr",
)  # fmt: skip
# The UNet is called with text_embeds and time_ids, and with nothing else.
UNET_IS = {
    "addition_embed_type": "text_time",
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "downsample_padding": 1,
}
VAE_IS = {"shift_factor": None, "latents_mean": None, "latents_std": None}
# Numbers that no weight's shape tells, above zero; the first ones are whole.
WHOLE = ("norm_num_groups", "attention_head_dim")
ABOVE_ZERO = (
    *WHOLE, "norm_eps", "mid_block_scale_factor", "resnet_out_scale_factor", "scaling_factor",
)  # fmt: skip
LARGEST, LONGEST, MOST_STEPS = 2**20, 64, 100_000
TIME_IDS = 6

P = TypeVar("P")


def read_settings(path: Path, cls: type) -> dict[str, object]:
    """The arguments of `cls`, a class of diffusers, in a settings file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no JSON object, of another class, or has unknown keys or odd values.
    """
    values = read_json(path)
    found = values.get("_class_name")
    if found != cls.__name__:
        raise ValueError(
            f"load: {path} must have the _class_name {cls.__name__}, got {repr(found)[:80]}"
        )
    return check_settings(values, cls, str(path))


def check_settings(values: Mapping[str, object], cls: type, where: str) -> dict[str, object]:
    """`values` without leftovers of other classes and what diffusers notes down for itself.

    Raises:
        ValueError: unknown keys, or values that are not numbers, short words and lists of them.
    """
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    kept = {k: v for k, v in values.items() if k not in LEFTOVERS and not k.startswith("_")}
    unknown = sorted(repr(key)[:LONGEST] for key in kept if key not in known)
    if unknown:
        raise ValueError(
            f"load: {where} must hold settings of {cls.__name__}, got unknown keys "
            + ", ".join(unknown[:10])
        )
    odd = [f"{key} = {repr(value)[:40]}" for key, value in kept.items() if not _is_plain(value)]
    if odd:
        raise ValueError(
            f"load: {where} must hold numbers, words and lists of them, got " + "; ".join(odd[:10])
        )
    return kept


def _is_plain(value: object, depth: int = 0) -> bool:
    if isinstance(value, list | tuple):
        return (
            depth < 2 and len(value) <= MOST_STEPS and all(_is_plain(v, depth + 1) for v in value)
        )
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= LONGEST and value.isprintable()
    return (
        value is None or isinstance(value, bool) or (type(value) is int and abs(value) <= LARGEST)
    )


def build_part(
    cls: type[P], settings: Mapping[str, object], where: str, *, device: str = "meta"
) -> P:
    """`cls` with these settings, by default without memory for its weights.

    Raises:
        ValueError: the settings do not fit together.
    """
    try:
        with torch.device(device):
            return cls(**settings)
    except Exception as error:  # whatever diffusers makes of senseless sizes
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"load: {where} must hold sizes that fit together: {first}") from error


def check_depth(settings: Mapping[str, object], tensors: int, where: str) -> None:
    """Refuse more blocks than `tensors` can fill, before they are built.

    Raises:
        ValueError: there are.
    """
    most = 1
    for key in ("layers_per_block", "transformer_layers_per_block", "block_out_channels"):
        value = settings.get(key, 1)
        numbers = [number for number in _flat(value) if isinstance(number, int)]
        most *= len(numbers) if key == "block_out_channels" else max(numbers, default=1)
    if most > max(4 * tensors, 100):
        raise ValueError(
            f"load: {where} must have at most {tensors} tensors as the weights, got {most} layers"
        )


def _flat(value: object) -> list[object]:
    if not isinstance(value, list | tuple):
        return [value]
    return [number for entry in value for number in _flat(entry)]


def check_unet(unet: nn.Module, where: str) -> None:
    """Refuse a UNet that cannot be called as SDXL's is.

    Raises:
        ValueError: it needs other inputs than latents, features, their mean and the six sizes.
    """
    config = unet.config
    _check_values(config, UNET_IS, where)
    _check_numbers(config, where)
    if not _is_number(config.freq_shift, (int, float)) or config.freq_shift < 0:
        raise ValueError(f"load: {where} must have a freq_shift, got {config.freq_shift!r:.40}")
    width, given = config.cross_attention_dim, config.projection_class_embeddings_input_dim
    time_width = config.addition_time_embed_dim
    whole = type(width) is type(time_width) is int
    if not whole or given != width + TIME_IDS * time_width:
        raise ValueError(
            f"load: {where} must have projection_class_embeddings_input_dim = cross_attention_dim "
            f"+ {TIME_IDS} * addition_time_embed_dim, got {given}, {width} and {time_width}"
        )
    if config.in_channels != config.out_channels:
        channels = [config.in_channels, config.out_channels]
        raise ValueError(f"load: {where} must give as many channels as it takes, got {channels}")


def check_vae(vae: nn.Module, unet: nn.Module, where: str) -> None:
    """Refuse a decoder that does not draw RGB from the latents of `unet`.

    Raises:
        ValueError: it does not.
    """
    config = vae.config
    _check_values(config, {**VAE_IS, "out_channels": 3}, where)
    _check_numbers(config, where)
    if config.latent_channels != unet.config.in_channels:
        raise ValueError(
            f"load: {where} must have latent_channels {unet.config.in_channels} as the UNet, "
            f"got {config.latent_channels}"
        )


def _check_values(config: Mapping[str, object], wanted: Mapping[str, object], where: str) -> None:
    for key, value in wanted.items():
        if config[key] != value or type(config[key]) is not type(value):  # True is not 1
            raise ValueError(f"load: {where} must have {key} {value!r}, got {config[key]!r}")


def _check_numbers(config: Mapping[str, object], where: str) -> None:
    for key in ABOVE_ZERO:
        kinds = (int,) if key in WHOLE else (int, float)
        value = config.get(key, 1)
        numbers = _flat(value) if key == "attention_head_dim" else [value]
        if not all(_is_number(number, kinds) and number > 0 for number in numbers):
            raise ValueError(
                f"load: {where} must have a {key} above 0, got {repr(config[key])[:40]}"
            )


def _is_number(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def check_scheduler(settings: Mapping[str, object], where: str) -> None:
    """Refuse settings of the noise schedule that mean nothing.

    Raises:
        ValueError: a word that is none of `CHOICES`, or numbers out of range; the first is named.
    """
    from diffusers import EulerDiscreteScheduler

    for key, choices in CHOICES.items():
        if key in settings and settings[key] not in choices:
            raise ValueError(
                f"load: {where} must have {key} of {', '.join(choices)}, got {settings[key]!r}"
            )
    for key in FLAGS:
        if settings.get(key, False) not in (True, False, None):
            raise ValueError(f"load: {where} must have {key} true or false, got {settings[key]!r}")
    steps = settings.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise ValueError(
            f"load: {where} must have num_train_timesteps from 1 to {MOST_STEPS}, got {steps!r}"
        )
    offset = settings.get("steps_offset", 0)
    if type(offset) is not int or not 0 <= offset < steps:
        raise ValueError(f"load: {where} must have steps_offset below {steps}, got {offset!r}")
    trained = settings.get("trained_betas")
    betas = [] if trained is None else _flat(trained)
    named = [settings[key] for key in ("beta_start", "beta_end") if key in settings]
    for beta in (*named, *betas):
        if not isinstance(beta, float) or not 0 < beta < 1:
            raise ValueError(f"load: {where} must have betas between 0 and 1, got {beta!r:.40}")
    if trained is not None and len(betas) != steps:
        raise ValueError(f"load: {where} must have {steps} trained_betas, got {len(betas)}")
    build_part(EulerDiscreteScheduler, settings, where, device="cpu")
