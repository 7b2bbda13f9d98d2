"""`clipflow train`: run a recipe, or all that make a scenes model."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipflow.cli.arguments import UsageError, add_command, at_least_one, positive

# How messages about what the user gave begin; other ValueErrors are bugs and keep their traceback.
REFUSALS = ("recipe", "training:", "checkpoint:", "load:")


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "train",
        "train a model from a recipe; a stopped run continues where it was",
        "clipflow train scenes --out runs/",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="scenes (everything, from nothing), scenes-blip3o, a recipe's name or file",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the runs")
    parser.add_argument("--steps", type=at_least_one, help="in place of the recipe's steps")
    parser.add_argument("--minutes", type=positive, help="stop after so long, to be continued")
    parser.add_argument(
        "--scale", type=positive, help="with scenes...: factor on the length of every stage"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.errors import InputError
    from clipflow.training.run import CHAINS, train, train_scenes

    scenes = args.recipe in CHAINS
    if scenes and (args.steps or args.minutes):
        raise UsageError(f"train {args.recipe} takes --scale, not --steps or --minutes")
    if args.scale and not scenes:
        names = " and ".join(f"`train {name}`" for name in CHAINS)
        raise UsageError(f"--scale goes with {names} only")
    progress = not args.quiet
    try:
        if scenes:
            scale = args.scale or 1.0
            final = train_scenes(args.out, chain=args.recipe, scale=scale, progress=progress)
        else:
            limits = {"steps": args.steps, "minutes": args.minutes}
            final = train(args.recipe, args.out, progress=progress, **limits)
    except (FileNotFoundError, PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"train: {error}") from error
    except ValueError as error:
        if str(error).startswith(REFUSALS):
            raise InputError(f"train: {error}") from error
        raise
    print(final)
    return 0
