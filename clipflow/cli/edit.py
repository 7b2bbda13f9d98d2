"""`clipflow edit`: a picture redrawn as told."""

from __future__ import annotations

import argparse

from clipflow.cli.arguments import (
    add_command,
    add_model_options,
    add_sampling_options,
    load_pipeline,
    sampling_options,
    text,
)


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "edit",
        "change a picture as told",
        'clipflow edit in.png "make the circle green" -o out.png',
    )
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument("instruction", metavar="INSTRUCTION", type=text, help="what to change")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE_OR_DIR", help="a picture file, or a folder"
    )
    parser.add_argument("--grid", action="store_true", help="lay all pictures out in one")
    add_sampling_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.cli.pictures import generators, plan_outputs
    from clipflow.pipelines.image_io import load_image

    image = load_image(args.image)
    captions = [args.instruction] * args.num_images
    outputs = plan_outputs(args.output, captions, grid=args.grid)
    pipe = load_pipeline(args)
    first_seed, dice = generators(args.seed, args.num_images)
    images = pipe.edit(
        image,
        args.instruction,
        num_images_per_prompt=args.num_images,
        **sampling_options(args),
        generator=dice,
    ).images
    for path in outputs.write(images, captions):
        print(f"{path}  seeds from {first_seed}  {args.instruction}")
    return 0
