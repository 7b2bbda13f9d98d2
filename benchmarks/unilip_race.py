"""Four pictures of one prompt: the reference's loop against ours, paired and in turn."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.unilip_reference import ReferencePipeline, Seconds
from benchmarks.ratios import paired_ratio
from benchmarks.sampling_models import relative_error
from clipflow import CLIPFlowPipeline
from clipflow.pipelines.image_processor import postprocess

Result = dict[str, object]
PICTURES, BLOCKS, GUIDANCE = 4, 4, 4.5
BAR = 2.0
ERROR_BAR = 1e-3  # relative L2 of the faithful latents to the reference's
# A new prompt in every round: nothing but the null prompt is known.
THINGS = ("house", "tower", "river", "forest", "garden", "street", "bridge", "castle")
PROMPT = "a photo of a {} at the end of the day, with a lake in front and hills behind it"


def race(folder: Path, *, steps: int, rounds: int, pictures: int = PICTURES) -> Result:
    """Seconds of every round and phase, and paired ratios of reference over ours."""
    pipe = CLIPFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    truncate(pipe, BLOCKS)
    reference = ReferencePipeline(pipe.model, pipe.prompts, guidance=GUIDANCE, steps=steps)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(pictures, *pipe.model.latent_shape, generator=generator)
    names = ("reference", "faithful", "fast")
    ours(pipe, PROMPT.format("square"), noise, steps, "faithful")  # makes plans, knows the null
    ours(pipe, PROMPT.format("square"), noise, steps, "fast")
    reference(PROMPT.format("square"), noise[:1])
    times: dict[str, list[Seconds]] = {name: [] for name in names}
    errors = {}
    for number in range(rounds):
        prompt = PROMPT.format(THINGS[number % len(THINGS)])
        found = {}
        for name in names if number % 2 == 0 else reversed(names):
            pipe.condition_cache.clear()
            if name == "reference":
                found[name], seconds = theirs(reference, prompt, noise)
            else:
                pipe.conditions.text_to_image([None])  # constant of the checkpoint
                found[name], seconds = ours(pipe, prompt, noise, steps, name)
            times[name].append(seconds)
            print(f"round {number}, {name:<10}", seconds, flush=True)
        for name in names[1:]:
            error = relative_error(found[name], found["reference"])
            errors[name] = max(error, errors.get(name, 0.0))
    wrong = [] if errors["faithful"] <= ERROR_BAR else [f"faithful: {errors['faithful']:.1e}"]
    rows = [_row(name, times, errors) for name in names]
    return {"pictures": pictures, "blocks": BLOCKS, "steps": steps, "rounds": rounds,
            "bar": BAR, "rows": rows, "wrong": wrong}  # fmt: skip


def truncate(pipe: CLIPFlowPipeline, blocks: int) -> None:
    """Leave only the first `blocks` of the diffusion transformer."""
    dit, config = pipe.model.dit, pipe.model.config
    if len(dit.transformer_blocks) > blocks:
        dit.transformer_blocks = dit.transformer_blocks[:blocks]
        dit.config = replace(dit.config, num_layers=blocks)
        pipe.model.config = replace(config, dit=dit.config)


def theirs(reference: ReferencePipeline, prompt: str, noise: Tensor) -> tuple[Tensor, Seconds]:
    """One call for each picture, as there is no other."""
    reference.seconds = Seconds()
    latents = [reference(prompt, one[None])[0] for one in noise]
    return torch.cat(latents), reference.seconds


@torch.no_grad()
def ours(
    pipe: CLIPFlowPipeline, prompt: str, noise: Tensor, steps: int, tier: str
) -> tuple[Tensor, Seconds]:
    """One call for all pictures; then what the pipeline does with latents."""
    model = pipe.model
    marks = [time.perf_counter()]
    pipe.conditions.text_to_image([prompt, None])
    marks.append(time.perf_counter())
    latents = pipe(
        prompt,
        num_images_per_prompt=len(noise),
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        tier=tier,
        output_type="latent",
    ).images
    marks.append(time.perf_counter())
    postprocess(model.decode(latents / model.config.unilip_factor), model.config.output_size, "pil")
    marks.append(time.perf_counter())
    seconds = Seconds(*(after - before for before, after in pairwise(marks)))
    return latents, seconds


def _row(name: str, times: dict[str, list[Seconds]], errors: dict[str, float]) -> Result:
    rounds = {key: [asdict(s)[key] for s in times[name]] for key in asdict(times[name][0])}
    peer = {key: [asdict(s)[key] for s in times["reference"]] for key in rounds}
    for table in (rounds, peer):
        table["latents"] = [sum(p) for p in zip(table["condition"], table["sampling"], strict=True)]
        table["call"] = [sum(p) for p in zip(table["latents"], table["decode"], strict=True)]
    row: Result = {"name": name, "error": errors.get(name), "rounds": rounds}
    if name != "reference":
        row["times_faster"] = {key: vars(paired_ratio(peer[key], rounds[key])) for key in rounds}
        for key, ratio in row["times_faster"].items():
            print(
                f"{name}, {key:<10}{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            )
    return row
