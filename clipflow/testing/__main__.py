"""`python -m clipflow.testing FOLDER`: a folder of published form with random weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from clipflow.errors import InputError
from clipflow.testing import SIZES, write_unilip_folder

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder that the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m clipflow.testing",
        description="Write a UniLIP folder of the published form, with random weights.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--size", default="tiny", choices=SIZES, help="default: tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="default: bfloat16")
    parser.add_argument("--seed", default=0, type=int, help="default: 0")
    args = parser.parse_args(argv)
    try:
        folder = write_unilip_folder(args.folder, args.size, getattr(torch, args.dtype), args.seed)
    except (InputError, OSError) as error:
        print(f"clipflow.testing: error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}  UniLIP {args.size}, random weights, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
