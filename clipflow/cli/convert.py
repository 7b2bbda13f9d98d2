"""`clipflow convert`: checkpoints to safetensors, and tokenizer checkpoints to folders."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from clipflow.cli.arguments import DTYPES, UsageError, add_command

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
FORMATS = ("unilip-tokenizer",)
DECODER_FOLDER = "diffusion-decoder"  # of BLIP3-o; holds safetensors as it is


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "convert",
        "convert a .pth, .pt or .bin checkpoint to safetensors, offline",
        "clipflow convert 1b_unilip.pth --from unilip-tokenizer -o tokenizer/",
    )
    parser.add_argument(
        "source", type=Path, metavar="FILE", help="a checkpoint, or a folder with one in shards"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT",
        help="a file .safetensors, or a folder",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="form", choices=FORMATS, help="what FILE is, if it is to become a model"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="a model folder, to be copied with FILE's parts"
    )
    parser.add_argument("--key", metavar="NAME", help="entry of FILE that holds the tensors")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument(
        "--max-shard-size", type=size, metavar="SIZE", help="of each file (default: 2GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.base and not args.form:
        raise UsageError("--base goes with --from unilip-tokenizer")
    if args.base and args.dtype:
        raise UsageError("--dtype does not go with --base, whose dtypes are kept")
    if args.max_shard_size and args.output.suffix == ".safetensors":
        raise UsageError("--max-shard-size goes with a folder: -o DIR")
    import torch

    from clipflow.models.folders.conversion import MAX_SHARD_BYTES, convert_checkpoint

    options = {
        "key": args.key,
        "dtype": args.dtype and getattr(torch, args.dtype),
        "max_shard_bytes": args.max_shard_size or MAX_SHARD_BYTES,
        "force": args.force,
        "progress": True,
    }
    notes = []
    if args.form:
        from clipflow.models.unilip.tokenizer_checkpoint import convert_tokenizer

        found = convert_tokenizer(args.source, args.output, base=args.base, **options)
        checkpoint, count = found.checkpoint, len(found.names)
        notes += [f"{len(found.ignored)} left out (regressor)"] if found.ignored else []
    else:
        checkpoint = convert_checkpoint(args.source, args.output, **options)
        count = len(checkpoint.specs)
    notes += [f"taken from {name!r}" for name in checkpoint.wrappers]
    if checkpoint.folder and (checkpoint.folder / DECODER_FOLDER).is_dir():
        notes += [f"copy {DECODER_FOLDER}/ there, too, to draw with it"]
    print("  ".join([str(args.output), f"{count} tensors", *notes]))
    return 0


def size(value: str) -> int:
    """Bytes: 500MB, 2GB."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([KMGT]?B|)", value.strip().upper())
    unit = UNITS[match[2]] if match else 0
    found = int(float(match[1]) * unit) if match else 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 2GB, got {value!r}")
    return found
