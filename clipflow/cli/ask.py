"""`clipflow ask`: a question about pictures."""

from __future__ import annotations

import argparse

from clipflow.cli.answering import add_answer_options, answer_options, print_answer, user_message
from clipflow.cli.arguments import add_command, add_model_options, load_pipeline, text


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "ask",
        "answer a question about a picture, or several",
        'clipflow ask in.png "what colour is the circle?"',
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("question", metavar="QUESTION", type=text)
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    add_answer_options(parser, tiles="1, where the model cuts tiles")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.pipelines.image_io import load_image

    images = [load_image(image) for image in args.images]
    pipe = load_pipeline(args)
    pipe.family.require("ask", pipe.model)
    messages = [user_message(images, pipe.prompts.check("question", args.question))]
    options = answer_options(args)
    if options["max_tiles"] is None:
        options["max_tiles"] = pipe.reader.ask_tiles
    answer = pipe.chat(messages, stream=args.stream, **options)
    print_answer(answer)
    return 0
