"""How much memory a device has left, asked before something large is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from clipflow.errors import NotEnoughMemory

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_system_bytes(), _container_bytes()) if limit is not None]
    return min(limits, default=None)


def require_bytes(needed: int, device: torch.device, what: str) -> None:
    """Raise before an allocation that cannot succeed.

    Raises:
        NotEnoughMemory: `device` has fewer than `needed` bytes left; names both and `what`.
    """
    free = available_bytes(device)
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"{what} needs {gigabytes(needed)} on {device}, and {gigabytes(free)} are free"
        )


def gigabytes(count: int) -> str:
    """`count` bytes for people."""
    return f"{count / 2**30:.2f} GiB"


def _system_bytes() -> int | None:
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            name, value = line.split(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container_bytes() -> int | None:
    """What the control group leaves; files it caches can be dropped, so they count as free."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
