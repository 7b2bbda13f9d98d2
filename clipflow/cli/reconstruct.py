"""`clipflow reconstruct`: a picture drawn again from its CLIP features."""

from __future__ import annotations

import argparse

from clipflow.cli.arguments import (
    add_command,
    add_model_options,
    load_pipeline,
    load_tokenizer,
    picture_side,
)


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "reconstruct",
        "draw a picture again from its features, with PSNR and SSIM",
        "clipflow reconstruct in.png -o again.png",
    )
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="a picture file")
    parser.add_argument(
        "--resolution",
        type=picture_side,
        metavar="N",
        help="side in pixels of the square that is seen and drawn (default: the model's)",
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from PIL import Image

    from clipflow.cli.pictures import plan_file
    from clipflow.pipelines.image_io import load_image, save_image
    from clipflow.pipelines.quality import psnr, ssim

    image = load_image(args.image)
    path = plan_file(args.output)
    pipe = load_tokenizer(args) or load_pipeline(args)
    (again,) = pipe.reconstruct(image, resolution=args.resolution).images
    save_image(again, path)
    side = args.resolution or pipe.image_processor.size
    processor = dataclasses.replace(pipe.image_processor, size=side)
    seen = processor.resize(image).resize(again.size, Image.Resampling.BICUBIC)
    print(f"{path}  PSNR {psnr(seen, again):.2f} dB  SSIM {ssim(seen, again):.4f}")
    return 0
