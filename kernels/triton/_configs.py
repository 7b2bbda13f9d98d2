"""Launch configurations of the row kernels: rows that a program holds, and its warps.

`configs.json` beside this file has them by op, GPU architecture and row length D;
`clipflow bench tune` writes it. What it does not name takes the computed default. Nothing is tuned
at run time, and nothing is ever chosen by the number of rows: the configuration decides in which
order a row is summed, and a row's bits must not depend on the batch that it comes in.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton

PATH = Path(__file__).with_name("configs.json")
Key = tuple[str, str, int]  # op, architecture, D
Config = tuple[int, int]  # rows, warps

MOST_ROWS, MOST_WARPS = 16, 16


def read(path: Path = PATH) -> dict[Key, Config]:
    """The configurations of a file, {"op": {"sm_90": {"192": {"rows": 2, "warps": 2}}}}."""
    return {
        (op, arch, int(channels)): (config["rows"], config["warps"])
        for op, archs in json.loads(path.read_text())["configs"].items()
        for arch, by_channels in archs.items()
        for channels, config in by_channels.items()
    }


def default(op: str, channels: int) -> Config:
    """About 8 values a lane; of short rows, several a program, so that each lane has work.

    Backwards hold sums for each value beside and take fewer rows, or ptxas would spill.
    """
    block = triton.next_power_of_2(channels)
    rows = min(MOST_ROWS, max(1, (256 if op.endswith("_backward") else 512) // block))
    return rows, min(MOST_WARPS, max(1, rows * block // 256))


def tile(op: str, channels: int, device: int) -> tuple[int, int, int]:
    """Rows and channels (a power of two) that a program of `op` holds, and its warps.

    Args:
        op: the op as its schema names it, e.g. "adaln_norm_backward".
        channels: row length D.
        device: of the tensors, as `Tensor.get_device()` says; -1, the CPU, takes the default.
    """
    arch = ARCHS[device] if device >= 0 else "cpu"
    rows, warps = TABLE.get((op, arch, channels)) or default(op, channels)
    return rows, triton.next_power_of_2(channels), warps


def converts_float8(device: int) -> bool:
    """Whether the device has instructions for float8_e4m3fn: compute capability 8.9 and later."""
    return device >= 0 and CAPABILITIES[device] >= (8, 9)


@contextmanager
def override(key: Key, config: Config) -> Iterator[None]:
    """Launch with `config` inside the block, to time it or to compile it."""
    before = TABLE.get(key)
    TABLE[key] = config
    try:
        yield
    finally:
        if before is None:
            del TABLE[key]
        else:
            TABLE[key] = before


TABLE = read()
# Looked up once, at import, so that torch.compile sees constants.
CAPABILITIES = tuple(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
ARCHS = tuple(f"sm_{major}{minor}" for major, minor in CAPABILITIES)
