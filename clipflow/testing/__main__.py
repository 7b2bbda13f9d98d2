"""`python -m clipflow.testing FOLDER`: a folder of published form with random weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from clipflow.errors import InputError
from clipflow.testing import (
    BLIP3O_SIZES,
    NEXT_SIZES,
    SIZES,
    write_blip3o_folder,
    write_blip3o_next_folder,
    write_unilip_folder,
)

DTYPES = ("bfloat16", "float16", "float32")
# What a family is called -> its name, its sizes, and what writes its folders.
FAMILIES = {
    "unilip": ("UniLIP", SIZES, write_unilip_folder),
    "blip3o": ("BLIP3-o", BLIP3O_SIZES, write_blip3o_folder),
    "blip3o-next": ("BLIP3o-NEXT", NEXT_SIZES, write_blip3o_next_folder),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder that the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m clipflow.testing",
        description="Write a folder of a published form, with random weights.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--family", default="unilip", choices=FAMILIES, help="default: unilip")
    shown = ", ".join(dict.fromkeys(size for _, sizes, _ in FAMILIES.values() for size in sizes))
    parser.add_argument("--size", default="tiny", help=f"of the family's: {shown} (default: tiny)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="default: bfloat16")
    parser.add_argument("--seed", default=0, type=int, help="default: 0")
    args = parser.parse_args(argv)
    name, sizes, write = FAMILIES[args.family]
    if args.size not in sizes:
        parser.error(f"--size of {args.family} must be one of {', '.join(sizes)}, got {args.size}")
    dtype = getattr(torch, args.dtype)
    try:
        folder = write(args.folder, args.size, dtype=dtype, seed=args.seed)
    except (InputError, OSError) as error:
        print(f"clipflow.testing: error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}  {name} {args.size}, random weights, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
