"""`clipflow eval`: scores of a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from clipflow.cli.arguments import (
    add_command,
    add_model_options,
    at_least_one,
    guidance,
    load_pipeline,
    seed,
    steps,
)


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "eval",
        "score a model on the scenes world",
        "clipflow eval scenes --json scores.json",
    )
    parser.add_argument("suite", choices=["scenes"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too")
    parser.add_argument(
        "--prompts-per-tag", type=at_least_one, default=100, metavar="N", help="default: 100"
    )
    parser.add_argument("--steps", type=steps, default=20, help="solver steps (default: 20)")
    parser.add_argument("--guidance", type=guidance, help="default: the model's")
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.pipelines.image_io import check_writable, write_atomically

    if args.json:
        check_writable(args.json)
    from clipflow.evaluation.scenes import evaluate  # slow, so after the check
    from clipflow.evaluation.table import format_table

    pipe = load_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    scores = evaluate(
        pipe,
        prompts_per_tag=args.prompts_per_tag,
        steps=args.steps,
        guidance_scale=args.guidance,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    print(format_table(scores))
    if args.json:
        content = json.dumps(scores, indent=2) + "\n"
        write_atomically(args.json, lambda file: file.write(content.encode()))
    return 0
