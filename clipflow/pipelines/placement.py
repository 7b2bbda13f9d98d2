"""Where a model is put: whether its weights fit, and whether parts have to wait on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from clipflow.errors import InputError
from clipflow.pipelines.loading import summarize_folder
from clipflow.pipelines.memory_estimate import DIT, folder_estimate, weight_bytes
from clipflow.pipelines.offload import CPU
from clipflow.sampling.memory import available_bytes, require_bytes

OFFLOAD_MODES = ("auto", "never", "always")


def should_offload(
    folder: Path, device: torch.device, dtype: torch.dtype, tier: str, mode: str
) -> bool:
    """Whether the model in `folder` needs `enable_model_cpu_offload` on `device`.

    Args:
        folder: of the model; only config.json and the headers of its weights are read.
        device: where it is to run.
        dtype: of its weights.
        tier: of sampling.
        mode: of `OFFLOAD_MODES`; "auto" is for one picture with the model's defaults.

    Raises:
        InputError: an unknown mode, "always" on the CPU, or a broken folder.
        NotEnoughMemory: the weights fit neither way; names the needed and the free bytes.
    """
    if mode not in OFFLOAD_MODES:
        raise InputError(f"offload must be one of {', '.join(OFFLOAD_MODES)}, got {mode!r}")
    if mode == "always":
        device = execution_device(device, CPU)
    offload = mode == "always"
    if mode == "auto" and device != CPU:
        estimate = folder_estimate(folder, dtype=dtype, tier=tier, device=device)
        free = available_bytes(device)
        offload = free is not None and estimate.peak_with_offload <= free < estimate.peak
    summary = summarize_folder(folder)
    weights = weight_bytes(summary.family, summary.counts, dtype)
    staying = weights[DIT] if offload else sum(weights.values())
    require_bytes(staying, device, f"loading {folder.name}")
    require_bytes(sum(weights.values()) - staying, CPU, f"loading {folder.name}")
    return offload


def execution_device(device: str | torch.device | None, current: torch.device) -> torch.device:
    """Where an offloaded pipeline runs: `device`, or else where it is, or else the GPU.

    Raises:
        InputError: that is the CPU, or there is no GPU.
    """
    if device is None and current == CPU:
        if not torch.cuda.is_available():
            raise InputError("offload must have a device other than the CPU, and no GPU is here")
        device = "cuda"
    chosen = current if device is None else torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    if chosen == CPU:
        raise InputError("offload must have a device other than the CPU, got 'cpu'")
    return chosen
