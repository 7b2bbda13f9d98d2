"""`clipflow eval`: scores of a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipflow.cli.arguments import (
    add_command,
    add_model_options,
    add_speed_options,
    at_least_one,
    guidance,
    load_pipeline,
    seed,
    speed_options,
    steps,
)

if TYPE_CHECKING:
    from clipflow.pipelines import CLIPFlowPipeline


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "eval",
        "score a model on the scenes, or compare fast pictures to faithful ones",
        "clipflow eval scenes --json scores.json",
    )
    parser.add_argument(
        "suite",
        choices=["scenes", "fidelity"],
        help="fidelity: distance of the pictures of --tier and --step-cache to the faithful ones",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too")
    parser.add_argument(
        "--prompts-per-tag", type=at_least_one, default=100, metavar="N", help="default: 100"
    )
    parser.add_argument("--steps", type=steps, help="solver steps (default: the model's)")
    parser.add_argument("--guidance", type=guidance, help="default: the model's")
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    add_speed_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.pipelines.image_io import check_writable, write_atomically

    if args.json:
        check_writable(args.json)
    pipe = load_pipeline(args)  # slow, so after the check
    pipe.set_progress_bar_config(disable=True)
    defaults = pipe.defaults  # named, so that the scores tell them
    options = {
        "steps": defaults.num_inference_steps if args.steps is None else args.steps,
        "guidance_scale": defaults.guidance_scale if args.guidance is None else args.guidance,
        "seed": args.seed,
        "progress": sys.stderr.isatty(),
        **speed_options(args),
    }
    scores = (_scenes if args.suite == "scenes" else _fidelity)(pipe, args.prompts_per_tag, options)
    if args.json:
        content = json.dumps(scores, indent=2) + "\n"
        write_atomically(args.json, lambda file: file.write(content.encode()))
    return 0


def _scenes(pipe: CLIPFlowPipeline, per_tag: int, options: dict[str, Any]) -> dict[str, Any]:
    from clipflow.evaluation.scenes import evaluate
    from clipflow.evaluation.table import format_table

    scores = evaluate(pipe, prompts_per_tag=per_tag, **options)
    print(format_table(scores))
    return scores


def _fidelity(pipe: CLIPFlowPipeline, per_tag: int, options: dict[str, Any]) -> dict[str, Any]:
    from clipflow.evaluation.fidelity import fidelity, fidelity_prompts

    scores = fidelity(pipe, fidelity_prompts(per_tag, options["seed"]), **options)
    for name, value in scores.items():
        print(f"{name.replace('_', ' '):<26}{value:.4g}")
    return scores
