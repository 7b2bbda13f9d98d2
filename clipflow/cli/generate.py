"""`clipflow generate`: pictures from texts."""

from __future__ import annotations

import argparse

from clipflow.cli.arguments import (
    add_command,
    add_model_options,
    add_sampling_options,
    at_least_one,
    load_pipeline,
    sampling_options,
    text,
)


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "generate",
        "draw pictures from texts",
        'clipflow generate "a red circle" "two blue stars" -o pictures/ --num-images 2 --grid',
    )
    parser.add_argument("prompt", nargs="+", type=text, help="what to draw")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE_OR_DIR", help="a picture file, or a folder"
    )
    parser.add_argument("--grid", action="store_true", help="lay all pictures out in one")
    parser.add_argument("--negative", metavar="TEXT", help="what to steer away from")
    parser.add_argument(
        "--batch-size", type=at_least_one, default=8, help="pictures drawn at once (default: 8)"
    )
    add_sampling_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.cli.pictures import generators, plan_outputs

    prompts = [prompt for prompt in args.prompt for _ in range(args.num_images)]
    outputs = plan_outputs(args.output, prompts, grid=args.grid)
    pipe = load_pipeline(args)
    first_seed, dice = generators(args.seed, len(prompts))
    images = []
    for start in range(0, len(prompts), args.batch_size):
        batch = slice(start, start + args.batch_size)
        images += pipe(
            prompts[batch],
            negative_prompt=args.negative,
            **sampling_options(args),
            generator=dice[batch],
        ).images
    written = list(outputs.write(images, prompts))
    if outputs.files:
        for k, (path, prompt) in enumerate(zip(outputs.files, prompts, strict=True)):
            print(f"{path}  seed {first_seed + k}  {prompt}")
    if outputs.grid:
        print(f"{written[-1]}  grid of {len(prompts)}, seeds from {first_seed}")
    return 0
