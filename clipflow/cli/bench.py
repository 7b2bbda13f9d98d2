"""`clipflow bench`: the repository's benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from clipflow.cli.arguments import UsageError, add_command

NAMES = (
    "ops", "sampling", "startup", "unilip", "blip3o", "loading", "kernels", "report", "tune",
)  # fmt: skip


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands, "bench", "measure the library on this machine", "clipflow bench ops"
    )
    parser.add_argument("name", choices=NAMES, nargs="?", default="ops", help="default: ops")
    parser.add_argument("--tune", action="store_true", help="the same as the name tune")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="go to the benchmark; try --help there"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    name = "tune" if args.tune else args.name
    path = find_benchmark(name)
    spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(args.arguments) or 0


def find_benchmark(name: str) -> Path:
    """The benchmark's file, beside the package or in the current folder.

    Raises:
        UsageError: the repository is not at hand.
    """
    package = Path(__file__).resolve().parents[2]
    for root in dict.fromkeys([package, Path.cwd()]):
        path = root / "benchmarks" / f"{name}.py"
        if path.is_file():
            return path
    raise UsageError(
        f"benchmarks/{name}.py is not here: benchmarks are in the clipflow repository, not in the "
        "installed package; run this in a clone of it"
    )
