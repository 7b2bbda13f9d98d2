"""Where the time of a whole UniLIP goes: seconds of its parts beside the FLOPs that they need."""

# Shape suffixes: H = LM width, L = positions.

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from clipflow import CLIPFlowPipeline
from clipflow.pipelines.image_io import save_image

Result = dict[str, object]
REPEATS = 3
PROMPT = (
    "a photo of a small red house between two trees, with a lake in front of it, in the evening"
)
# GFLOP of one call, specs of UniLIP section 9: two rows of 300 positions, one picture.
GFLOP = {
    "1b": {"vision tower": 724, "language model": 429, "connector": 107, "DiT step": 631,
           "DiT step, edit": 730, "decoder": 2092},
    "3b": {"vision tower": 724, "language model": 1572, "connector": 337, "DiT step": 1673,
           "DiT step, edit": 1916, "decoder": 2092},
}  # fmt: skip
LENGTH = 300


def measure_parts(folder: Path, size: str, steps: int) -> Result:
    """Load, draw and edit to files, then time every part; "calls" and "parts"."""
    calls: list[Result] = []

    def timed(name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        value = call()
        calls.append({"name": name, "seconds": time.perf_counter() - start})
        print(f"{size}, {name:<36}{calls[-1]['seconds']:>8.1f} s", flush=True)
        return value

    timed("load as stored", lambda: CLIPFlowPipeline.from_pretrained(folder, dtype="auto"))
    gc.collect()  # or the peak memory would be that of both
    pipe = timed("load in float32", lambda: CLIPFlowPipeline.from_pretrained(folder))
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    picture = Image.effect_noise((640, 400), 60).convert("RGB")
    marks: dict[str, list[float]] = {"DiT step": [], "DiT step, edit": []}

    def draw(part: str, call: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            options = {"num_inference_steps": steps, "generator": seed}
            image = call(callback_on_step_end=_stamps(marks[part]), **options).images[0]
            with tempfile.TemporaryDirectory() as place:
                save_image(image, Path(place) / "picture.png")
            if image.size != (448, 448):
                raise RuntimeError(f"unilip: a picture must be 448 x 448, got {image.size}")

        return run

    def generate(**options: object) -> object:
        return pipe(PROMPT, **options)

    def edit(**options: object) -> object:
        return pipe.edit(picture, PROMPT, **options)

    timed(f"generate, {steps} steps, to a file", draw("DiT step", generate))
    timed(f"edit, {steps} steps, to a file", draw("DiT step, edit", edit))
    timed(f"generate again, {steps} steps, to a file", draw("DiT step", generate))
    seconds = {part: statistics.median(marks[part]) for part in marks}
    parts = [
        {"name": name, "seconds": found, **_rate(size, name, found)}
        for name, found in {**_language(pipe), **seconds, **_decoder(pipe)}.items()
    ]
    for part in parts:
        print(f"{size}, {part['name']:<20}{part['seconds']:>8.3f} s {part['gflop'] or 0:>6} GFLOP")
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in _modules(pipe)}
    return {"calls": calls, "parts": parts, "parameters": counts}


def _modules(pipe: CLIPFlowPipeline) -> list[tuple[str, torch.nn.Module]]:
    return list(pipe.model.named_children())


def _stamps(seconds: list[float]) -> Callable[..., None]:
    """A callback that adds the seconds of each step but the first to `seconds`."""
    last: list[float] = []

    def after_step(*_: object) -> None:
        now = time.perf_counter()
        if last:
            seconds.append(now - last[0])
        last[:] = [now]

    return after_step


@torch.no_grad()
def _language(pipe: CLIPFlowPipeline) -> dict[str, float]:
    model = pipe.model
    side, width = model.config.image_size, model.config.text.hidden_size
    pixels = torch.randn(1, 3, side, side)
    hidden = torch.randn(2, LENGTH, width)
    return {
        "vision tower": _median(lambda: model.encode_image(pixels)),
        "language model": _median(lambda: model.read(hidden, None)),
        "connector": _median(lambda: model.llm_connector(hidden)),
    }


@torch.no_grad()
def _decoder(pipe: CLIPFlowPipeline) -> dict[str, float]:
    latents = torch.randn(1, *pipe.model.latent_shape)
    return {"decoder": _median(lambda: pipe.model.decode(latents))}


def _median(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _rate(size: str, part: str, seconds: float) -> Result:
    gflop = GFLOP.get(size, {}).get(part)
    return {"gflop": gflop, "gflop_per_s": gflop and gflop / seconds}
