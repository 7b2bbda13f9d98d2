"""`clipflow ask`: a question about a picture."""

from __future__ import annotations

import argparse

from clipflow.cli.arguments import (
    add_command,
    add_model_options,
    at_least_one,
    load_pipeline,
    text,
)


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "ask",
        "answer a question about a picture",
        'clipflow ask in.png "what colour is the circle?"',
    )
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument("question", metavar="QUESTION", type=text)
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, metavar="N", help="longest answer, in tokens"
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.pipelines.image_io import load_image

    image = load_image(args.image)
    pipe = load_pipeline(args)
    answer = pipe.ask(image, args.question, max_new_tokens=args.max_new_tokens, stream=args.stream)
    for piece in answer if args.stream else [answer]:
        print(piece, end="", flush=True)
    print()
    return 0
