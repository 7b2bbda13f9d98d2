"""The peak memory of calls, which Linux tells and lets be set back; of this process alone.

Other tests leave threads and memory behind, so a measure has a script and a process of its own.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def can_reset_its_peak() -> bool:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return "VmHWM" in STATUS.read_text()


def resident(key: str) -> int:
    """Bytes of "VmRSS" (now) or "VmHWM" (peak since the last reset)."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_of(call) -> tuple[int, object]:
    """The most memory that `call` held at a time, in bytes, and what it returned."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not used again unseen
    CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    result = call()
    return resident("VmHWM") - before, result


def least_peak_of(call) -> tuple[int, object]:
    """As `peak_of`, the least of three: each has what the call needs, some have more than that."""
    peaks = []
    for _ in range(3):
        peak, result = peak_of(call)
        peaks.append(peak)
    return min(peaks), result


def measured_by(script: str) -> dict:
    """What `script`, a file beside this one, prints as JSON."""
    path = Path(__file__).with_name(script)
    here = {**os.environ, "PYTHONPATH": str(path.parents[1])}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
