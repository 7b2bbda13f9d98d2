"""`clipflow classify`: which label fits a picture."""

from __future__ import annotations

import argparse
import json

from clipflow.cli.arguments import add_command, add_model_options, load_pipeline


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "classify",
        "rank labels by how well they fit a picture",
        'clipflow classify in.png --labels "a red circle,a blue star"',
    )
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument(
        "--labels", required=True, type=labels, metavar="A,B,C", help="labels between commas"
    )
    parser.add_argument("--json", action="store_true", help="print [[label, probability], ...]")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.pipelines.image_io import load_image

    image = load_image(args.image)
    ranking = load_pipeline(args).classify(image, args.labels)
    if args.json:
        print(json.dumps(ranking))
    else:
        for label, probability in ranking:
            print(f"{probability:7.4f}  {label}")
    return 0


def labels(value: str) -> list[str]:
    """Labels between commas; repeated ones count once."""
    found = list(dict.fromkeys(label.strip() for label in value.split(",")))
    if not all(found):
        raise argparse.ArgumentTypeError(f"must be labels between commas, got {value!r}")
    return found
