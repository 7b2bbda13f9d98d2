"""The command line: `clipflow COMMAND ...`."""

from clipflow.cli.main import main

__all__ = ["main"]
