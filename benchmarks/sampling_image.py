"""The embedded model from prompt to picture, warm, against its own unfused eager path."""

# Shape suffixes: B = samples, C = channels, L = condition tokens.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.ratios import paired_ratio
from benchmarks.sampling_models import relative_error
from benchmarks.timing import interleaved
from clipflow import CLIPFlowPipeline, use_backend
from clipflow.pipelines.image_processor import postprocess
from clipflow.pipelines.output import Pictures
from clipflow.sampling import flow_schedule, sample

Result = dict[str, object]
PROMPT = "a red circle left of a blue square"
RATIO_BAR, SECONDS_BAR = 3.0, 0.25
LATENTS_BAR = 1e-3  # relative L2 of the faithful latents to those of the eager path


@dataclass(frozen=True, kw_only=True)
class ImageScale:
    """Solver steps of a picture, pictures of the batch, A-B-B-A rounds."""

    steps: int
    batch: int
    rounds: int


def measure(scale: ImageScale, device: torch.device, dtype: torch.dtype) -> Result:
    """Rows of one picture and of a batch under "image", and lines of what is wrong."""
    pipeline = CLIPFlowPipeline.from_pretrained("scenes", device=device, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(scale.batch, *pipeline.model.latent_shape, generator=generator).to(device)
    one, steps = noise[:1], scale.steps
    eager = partial(eager_image, pipeline, PROMPT, one, steps)
    wanted = eager(output_type="latent")
    calls: dict[str, Callable[[], object]] = {"eager": eager}
    errors = {}
    for tier in ("faithful", "fast"):
        draw = partial(
            pipeline, PROMPT, latents=one, num_inference_steps=steps, tier=tier, return_dict=False
        )
        errors[tier] = relative_error(draw(output_type="latent")[0], wanted)
        calls[tier] = draw
        calls[f"{tier}, new prompt"] = partial(_forgetful, pipeline, draw)
    if dtype == torch.float32 and not errors["faithful"] <= LATENTS_BAR:
        raise RuntimeError(f"embedded model: latents are {errors['faithful']:.1e} from eager ones")
    for call in calls.values():
        call()
    times = interleaved(
        calls, rounds=scale.rounds, block_seconds=0.0, device=device, calls_in_block=2
    )
    rows = []
    for name, mine in times.items():
        ratio = vars(paired_ratio(times["eager"].wall, mine.wall))
        cpu_ratio = vars(paired_ratio(times["eager"].cpu, mine.cpu))
        row = {"name": name, "wall_s": mine.median, "cpu_s": mine.median_cpu}
        row |= {"times_faster_than_eager": ratio, "times_less_cpu_than_eager": cpu_ratio}
        rows.append({**row, "error": errors.get(name.partition(",")[0], 0.0)})
        print(
            f"scenes, one picture, {steps} steps, {name:<22}{mine.median:>7.3f} s "
            f"{ratio['value']:.2f}x eager [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        )
    bars = [bar("times faster than eager", rows[1]["times_faster_than_eager"]["value"], RATIO_BAR)]
    bars.append(bar("seconds of one picture", rows[1]["wall_s"], SECONDS_BAR, at_most=True))
    return {"image": {
        "steps": steps, "rows": rows, "bars": bars, **invariance(pipeline, noise, scale)
    }}  # fmt: skip


def eager_image(
    pipeline: CLIPFlowPipeline,
    prompt: str,
    noise: Tensor,
    steps: int,
    *,
    output_type: str = "pil",
) -> Pictures:
    """A picture as one would write it in PyTorch: no caches, no plan, no fused op.

    The language model reads both prompts every time, and every step calls the transformer on
    padded conditions with a mask.
    """
    model, config = pipeline.model, pipeline.model.config
    with use_backend("eager"), torch.no_grad():
        texts = [pipeline.prompts.text_to_image(text) for text in (None, prompt)]
        condition = model.encode_condition(*pipeline.prompts.rows(texts, pipeline.device))
        latents = sample(
            lambda x, times: model.dit(x, times, condition.hidden, condition.mask),
            noise,
            flow_schedule(steps, shift=config.flow_shift),
            guidance_scale=pipeline.defaults.guidance_scale,
            model_dtype=pipeline.dtype,
        )
        if output_type == "latent":
            return latents
        decoded = model.decode(latents / config.unilip_factor)
        return postprocess(decoded, config.output_size, output_type)


def invariance(pipeline: CLIPFlowPipeline, noise: Tensor, scale: ImageScale) -> Result:
    """How many times longer a batch takes with batch_invariant=True."""
    batch = len(noise)
    draw = partial(
        pipeline,
        PROMPT,
        latents=noise,
        num_images_per_prompt=batch,
        num_inference_steps=scale.steps,
        output_type="latent",
    )
    calls = {"together": draw, "one by one": partial(draw, batch_invariant=True)}
    for call in calls.values():
        call()
    times = interleaved(
        calls, rounds=scale.rounds, block_seconds=0.0, device=noise.device, calls_in_block=1
    )
    ratio = paired_ratio(times["one by one"].wall, times["together"].wall)
    print(f"scenes, batch of {batch}: batch_invariant=True takes {ratio.value:.2f} times as long")
    return {"batch": batch, "batch_invariant_cost": vars(ratio)}


def bar(name: str, value: float, limit: float, *, at_most: bool = False) -> Result:
    met = value < limit if at_most else value >= limit
    return {"name": name, "value": value, "bar": limit, "at_most": at_most, "met": met}


def _forgetful(pipeline: CLIPFlowPipeline, draw: Callable[[], object]) -> object:
    """As `draw` for a prompt never seen: its condition and the null prompt's are computed."""
    pipeline.condition_cache.clear()
    return draw()
