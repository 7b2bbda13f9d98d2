"""`clipflow chat`: a conversation, a line of input for each message."""

from __future__ import annotations

import argparse
import sys

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
    add_answer_options(parser, tiles=12)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.errors import InputError
    from clipflow.pipelines.image_io import load_image

    images = [load_image(image) for image in args.images]
    pipe = load_pipeline(args)
    shown = sys.stdin.isatty()
    if shown:
        print("An empty line ends the conversation.")
    messages: list[dict[str, object]] = []
    options = answer_options(args)
    while line := _next_line(shown):
        message = user_message(images if not messages else [], line)
        try:
            answer = print_answer(pipe.chat([*messages, message], stream=True, **options))
        except InputError as error:
            if not shown:
                raise
            print(f"clipflow: error: {error}", file=sys.stderr)
            continue
        messages.append(message)
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return 0


def _next_line(shown: bool) -> str:
    """What the user says next; empty at the end of the input, and where the user ends it."""
    try:
        line = input(PROMPT if shown else "").strip()
    except EOFError:
        return ""
    return "" if line == "/exit" else line
