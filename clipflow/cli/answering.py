"""What `clipflow ask` and `clipflow chat` share: options of an answer, messages, printing."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from clipflow.cli.arguments import (
    at_least_none,
    at_least_one,
    guidance,
    positive,
    probability,
    seed,
    text,
)

if TYPE_CHECKING:
    from PIL import Image


def add_answer_options(parser: argparse.ArgumentParser, *, tiles: str) -> None:
    """--max-new-tokens, --tiles, --max-pixels, --temperature, --top-p and others."""
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-new-tokens", type=at_least_one, metavar="N", help="longest answer, in tokens"
    )
    group.add_argument(
        "--tiles",
        type=at_least_one,
        metavar="N",
        help=f"see each picture as up to N tiles, by its shape (default: {tiles})",
    )
    group.add_argument(
        "--max-pixels",
        type=at_least_one,
        metavar="N",
        help="reduce larger pictures to N pixels, where the model sees them at their own size",
    )
    group.add_argument(
        "--temperature",
        type=guidance,
        default=0.0,
        help="how random; 0 (default) takes the likeliest token always",
    )
    group.add_argument(
        "--top-p",
        type=probability,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together have this probability (default: all)",
    )
    group.add_argument(
        "--top-k",
        type=at_least_none,
        default=0,
        metavar="K",
        help="draw from the K likeliest tokens (default: all)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=positive,
        metavar="X",
        help="above 1 makes tokens that were read or said less likely (default: the model's)",
    )
    group.add_argument(
        "--stop",
        action="append",
        type=text,
        metavar="TEXT",
        help="end before this text; may be repeated",
    )
    group.add_argument("--seed", type=seed, help="of what is random")


def answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_answer_options` read, as arguments of `chat`."""
    import torch

    generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
    return {
        "max_new_tokens": args.max_new_tokens,
        "max_tiles": args.tiles,
        "max_pixels": args.max_pixels,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "repetition_penalty": args.repetition_penalty,
        "stop": args.stop,
        "generator": generator,
    }


def user_message(images: Sequence[Image.Image], text: str) -> dict[str, object]:
    """A message of the user, its pictures first."""
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def print_answer(answer: str | Iterable[str]) -> str:
    """Print an answer, piece by piece where it is streamed; returns the whole."""
    said = ""
    for piece in [answer] if isinstance(answer, str) else answer:
        print(piece, end="", flush=True)
        said += piece
    print(flush=True)
    return said
