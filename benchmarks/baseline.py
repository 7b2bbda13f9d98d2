"""The ratios that were last accepted, and a warning where a new run falls more than 25 % below.

Run: python benchmarks/baseline.py RESULT.json  (accepts the result's ratios as the new baseline)

Ratios are compared, not times, and geometric means over an op's cases, since machines differ and
are shared. Only results of the same device and dtype are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

Result = dict[str, object]
BASELINE = Path(__file__).resolve().parent / "baseline.json"
LARGEST_FALL = 0.25


def key_of(result: Result, summary: Result) -> str:
    """E.g. "cpu float32 adaln_norm native / eager"."""
    settings = result["settings"]
    ours = f"{summary['op']} {summary['backend']} / {summary['peer']}"
    return f"{settings['device']} {settings['dtype']} {ours}"


def warnings(result: Result, baseline: dict[str, float]) -> list[str]:
    """One line for each geometric mean of `result` that fell by more than 25 %."""
    lines = []
    for summary in result["summaries"]:
        key = key_of(result, summary)
        accepted, found = baseline.get(key), summary["geomean"]
        if accepted is not None and found < (1 - LARGEST_FALL) * accepted:
            lines.append(f"{key}: {found:.2f}x, accepted was {accepted:.2f}x")
    return lines


def load(path: Path = BASELINE) -> dict[str, float]:
    """Accepted geometric means by key; {} before the first was accepted."""
    return json.loads(path.read_text()) if path.is_file() else {}


def accept(result: Result, path: Path = BASELINE) -> None:
    """Replace the baseline's entries for what `result` measured."""
    found = {key_of(result, s): round(s["geomean"], 2) for s in result["summaries"]}
    path.write_text(json.dumps(dict(sorted((load(path) | found).items())), indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    names = sys.argv[1:] if argv is None else argv
    if len(names) != 1 or not Path(names[0]).is_file():
        print("baseline: RESULT must be one file of benchmarks/ops.py, got", names, file=sys.stderr)
        return 2
    accept(json.loads(Path(names[0]).read_text()))
    print(BASELINE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
