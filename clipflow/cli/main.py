"""Entry point: parse, run one command, turn bad input into one line and exit code 2."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from clipflow import __version__
from clipflow.cli import (
    ask,
    bench,
    chat,
    classify,
    convert,
    demo,
    doctor,
    edit,
    evaluate,
    generate,
    info,
    reconstruct,
    train,
)
from clipflow.cli.arguments import HelpFormatter, OneLineParser, UsageError

# In the order of --help.
COMMANDS = (
    demo, generate, edit, ask, chat, classify, reconstruct, evaluate, train, convert, bench,
    doctor, info,
)  # fmt: skip

DESCRIPTION = """\
Draw, edit, question, classify and reconstruct pictures with one model.

A small model, "scenes", is part of the package: everything below works on a CPU, at once.
It knows a world of colored shapes; so does `--model scenes-blip3o`. `--model FOLDER` takes
another one."""

EXAMPLES = """\
start here:
  clipflow demo                                                 see everything it can do
  clipflow generate "a red circle left of a blue square" -o out.png
  clipflow edit out.png "make the circle green" -o green.png
  clipflow ask out.png "what colour is the circle?"
  clipflow chat out.png                                         converse about it
  clipflow classify out.png --labels "a red circle,a blue star"
  clipflow reconstruct out.png -o again.png

`clipflow COMMAND --help` explains a command.
Exit codes: 0 done, 2 bad input (one line on stderr)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: arguments without the program's name; those of the process when not given.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_note
        try:
            args = _parser().parse_args(argv)
            return args.run(args)
        except SystemExit as stop:  # argparse leaves so after --help and --version
            return int(stop.code or 0)
        except KeyboardInterrupt:
            return _complain("stopped", 130)
        except Exception as error:
            if not _is_the_users(error):
                raise
            return _complain(str(error), 2)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="clipflow",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clipflow {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def _is_the_users(error: Exception) -> bool:
    """Whether the input is at fault; all other errors are ours, and keep their traceback."""
    if isinstance(error, UsageError) or str(error).startswith("CLIPFLOW_BACKEND"):
        return True
    from clipflow.errors import BackendUnavailable, InputError, NotEnoughMemory  # import torch

    return isinstance(error, (InputError, BackendUnavailable, NotEnoughMemory))


def _complain(message: str, code: int) -> int:
    print(f"clipflow: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_note(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Our own warnings are notes to the user; those of libraries are not for users."""
    from clipflow.pipelines.prompts import UnknownWordWarning

    if issubclass(category, UnknownWordWarning):
        print(f"clipflow: note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
