"""Parsing shared by the commands: one-line errors, checked values, model and sampling options."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import torch

    from clipflow.pipelines import CLIPFlowPipeline, UniLIPTokenizer
    from clipflow.pipelines.decoding import FeatureDecoding, ImageTokenSampling
    from clipflow.sampling import StepCache

DTYPES = ("float32", "bfloat16", "float16")
SOLVERS = ("dpmpp_2m", "euler", "heun")
TIERS = ("faithful", "fast")
OUTPUT_RESOLUTIONS = ("model", "native")
DECODER_NULLS = ("sampled", "zero")
OFFLOAD_MODES = ("auto", "never", "always")


class UsageError(ValueError):
    """The command line itself is wrong; torch need not be loaded to say so."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and one line for each command."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    """Add a subcommand with its line in the overview and an example below its own help."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=HelpFormatter,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --dtype, --offload, --download."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="scenes",
        metavar="NAME",
        help="scenes (default), scenes-blip3o, or a model folder",
    )
    group.add_argument(
        "--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1"
    )
    group.add_argument(
        "--dtype",
        default="float32",
        choices=(*DTYPES, "auto"),
        help="of the weights; auto is as they are stored (default: float32)",
    )
    group.add_argument(
        "--offload",
        default="auto",
        choices=OFFLOAD_MODES,
        help="keep what does not draw on the CPU while it does not run (default: if need be)",
    )
    group.add_argument(
        "--download", action="store_true", help="let --model name a model on the Hugging Face hub"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """--steps, --guidance, --solver, --seed, --num-images, --output-resolution, and of speed."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=steps, help="solver steps (default: the model's)")
    group.add_argument(
        "--guidance",
        type=guidance,
        help="how strictly to follow the text; 1 is off (default: the model's)",
    )
    group.add_argument("--solver", choices=SOLVERS, help="default: the model's")
    group.add_argument("--seed", type=seed, help="of the first picture; the next ones count up")
    group.add_argument(
        "--num-images", type=at_least_one, default=1, metavar="N", help="pictures of each text"
    )
    group.add_argument(
        "--output-resolution",
        choices=OUTPUT_RESOLUTIONS,
        default="model",
        help="as the model's authors resize, or native: as decoded (default: model)",
    )
    add_speed_options(group)
    add_decoding_options(parser)
    group = parser.add_argument_group("image tokens, where the model draws them (BLIP3o-NEXT)")
    group.add_argument(
        "--allow-any-token",
        action="store_true",
        help="draw from the whole vocabulary, words too, as its authors' code does",
    )


def image_token_options(args: argparse.Namespace) -> ImageTokenSampling | None:
    """What `--allow-any-token` means; None without it."""
    if not args.allow_any_token:
        return None
    from clipflow.pipelines.decoding import ImageTokenSampling

    return ImageTokenSampling(allow_any_token=True)


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """--decoder-steps, --decoder-guidance, --decoder-null."""
    group = parser.add_argument_group("decoder, where it is a diffusion model (BLIP3-o)")
    group.add_argument("--decoder-steps", type=steps, help="steps (default: 50)")
    group.add_argument(
        "--decoder-guidance", type=guidance, help="how strictly to follow the features (default: 3)"
    )
    group.add_argument(
        "--decoder-null",
        choices=DECODER_NULLS,
        help="what guidance steers away from: features of no prompt, or zeros (default: sampled)",
    )


def decoding_options(args: argparse.Namespace) -> FeatureDecoding | None:
    """What `add_decoding_options` read; None where nothing was said."""
    said = {
        "num_inference_steps": args.decoder_steps,
        "guidance_scale": args.decoder_guidance,
        "null": args.decoder_null,
    }
    said = {name: value for name, value in said.items() if value is not None}
    if not said:
        return None
    from clipflow.pipelines.decoding import FeatureDecoding

    return FeatureDecoding(**said)


def add_speed_options(parser: argparse._ActionsContainer) -> None:
    """--tier, --step-cache."""
    parser.add_argument("--tier", choices=TIERS, help="fast computes in 8 bits (default: faithful)")
    parser.add_argument(
        "--step-cache",
        type=step_cache,
        metavar="CACHE",
        help="skip steps: first-block[:THRESHOLD] or taylor[:INTERVAL] (default: none)",
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling_options` read, as arguments of the pipeline's calls."""
    return {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "solver": args.solver,
        "output_resolution": args.output_resolution,
        "decoding": decoding_options(args),
        "image_tokens": image_token_options(args),
        **speed_options(args),
    }


def speed_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_speed_options` read, as arguments of the pipeline's calls."""
    return {"tier": args.tier, "step_cache": args.step_cache and args.step_cache.build()}


class StepCacheChoice(NamedTuple):
    """A step cache by name; None takes its default."""

    name: str
    value: float | int | None

    def build(self) -> StepCache:
        """The configuration that is meant."""
        from clipflow.sampling import FirstBlockCache, TaylorForecast  # slow

        kind = FirstBlockCache if self.name == "first-block" else TaylorForecast
        return kind() if self.value is None else kind(self.value)


def load_pipeline(args: argparse.Namespace) -> CLIPFlowPipeline:
    """The pipeline that the model options name."""
    import torch

    from clipflow.pipelines import model_folders

    device = chosen_device(args.device)
    folder = model_folders.find_model(args.model, local_files_only=not args.download)
    from clipflow.pipelines import CLIPFlowPipeline  # slow, so after all that may be refused

    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    pipe = CLIPFlowPipeline.from_pretrained(
        folder, device=device, dtype=dtype, offload=args.offload
    )
    pipe.set_progress_bar_config(disable=None)  # shown on a terminal, not in a log
    return pipe


def load_tokenizer(args: argparse.Namespace) -> UniLIPTokenizer | None:
    """The tokenizer that the model options name; None where they name a whole model."""
    import torch

    from clipflow.pipelines import model_folders

    device = chosen_device(args.device)
    folder = model_folders.find_model(args.model, local_files_only=not args.download)
    from clipflow.models.unilip.tokenizer_folder import is_tokenizer_folder  # slow

    if not is_tokenizer_folder(folder):
        return None
    from clipflow.pipelines import UniLIPTokenizer

    return UniLIPTokenizer.from_pretrained(folder, device=device, dtype=getattr(torch, args.dtype))


def chosen_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"--device {name}: there are {count} GPUs here")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def text(value: str) -> str:
    """A text that says something."""
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def steps(value: str) -> int:
    """A number of solver steps."""
    return _whole(value, 1, 1000)


def seed(value: str) -> int:
    """A seed, with room to count up from it."""
    return _whole(value, 0, 2**62)


def at_least_one(value: str) -> int:
    """A count."""
    return _whole(value, 1, 10**6)


def at_least_none(value: str) -> int:
    """A count that may be 0."""
    return _whole(value, 0, 10**6)


def probability(value: str) -> float:
    """A probability above 0."""
    return _number(value, "a number above 0 and at most 1", lambda number: 0 < number <= 1)


def picture_side(value: str) -> int:
    """Side of a picture in pixels, with room for the windows of SSIM."""
    return _whole(value, 7, 10**6)


def guidance(value: str) -> float:
    """A guidance scale, or a temperature."""
    return _number(value, "a number of at least 0", lambda number: number >= 0)


def positive(value: str) -> float:
    """A number above 0."""
    return _number(value, "a number above 0", lambda number: number > 0)


def step_cache(value: str) -> StepCacheChoice:
    """first-block[:THRESHOLD] or taylor[:INTERVAL]."""
    name, colon, number = value.partition(":")
    if name not in ("first-block", "taylor"):
        raise argparse.ArgumentTypeError(
            f"must be first-block[:THRESHOLD] or taylor[:INTERVAL], got {value!r}"
        )
    if not colon:
        return StepCacheChoice(name, None)
    return StepCacheChoice(
        name, positive(number) if name == "first-block" else _whole(number, 2, 1000)
    )


def _number(value: str, wanted: str, accepts) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not accepts(number):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {value!r}")
    return number


def _whole(value: str, low: int, high: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {low} to {high}, got {value!r}"
        )
    return number
