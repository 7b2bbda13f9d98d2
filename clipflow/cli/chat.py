"""`clipflow chat`: a conversation, a line of input for each message."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from clipflow.cli.answering import add_answer_options, answer_options, print_answer, user_message
from clipflow.cli.arguments import add_command, add_model_options, load_pipeline

PROMPT = "> "


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "chat",
        "converse about pictures, line by line",
        "clipflow chat in.png",
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="picture files, shown with the first line"
    )
    add_answer_options(parser, tiles="the model's, UniLIP: 12")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.errors import InputError
    from clipflow.pipelines.image_io import load_image

    images = [load_image(image) for image in args.images]
    pipe = load_pipeline(args)
    asked_for = sys.stdin.isatty()
    messages: list[dict[str, object]] = []
    options = answer_options(args)
    for line in _lines(asked_for):
        try:
            text = pipe.prompts.check("message", line)
            message = user_message([] if messages else images, text)
            answer = print_answer(pipe.chat([*messages, message], stream=True, **options))
        except InputError as error:
            if not asked_for:
                raise
            print(f"clipflow: error: {error}", file=sys.stderr)
            continue
        messages.append(message)
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return 0


def _lines(asked_for: bool) -> Iterator[str]:
    """What the user says, up to the end of the input or "/exit"; blank lines say nothing."""
    if asked_for:
        print("/exit or the end of the input ends the conversation.")
    while True:
        try:
            line = input(PROMPT if asked_for else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line
