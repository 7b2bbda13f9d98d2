"""How far the pictures of faster options are from the faithful ones of the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from clipflow.errors import InputError
from clipflow.evaluation.scenes import MAX_PSNR, Pipeline
from clipflow.pipelines.quality import mean_absolute_difference, psnr
from clipflow.sampling import StepCache
from clipflow.scenes import TAGS, evaluation_prompts


def fidelity(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    tier: str | None = None,
    step_cache: StepCache | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 50,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw each prompt faithfully and with `tier` and `step_cache`, and compare the pictures.

    Args:
        pipe: the pipeline.
        prompts: texts; one picture is drawn of each.
        tier: of the pictures that are compared; the pipeline's own if None.
        step_cache: of the pictures that are compared.
        steps: solver steps; the model's default if None.
        guidance_scale: the model's default if None.
        seed: of the first picture; the next ones count up.
        batch_size: pictures drawn at once; a step cache skips for all of them together.
        progress: show a bar.

    Returns:
        {"psnr": mean in dB, "median_psnr", "lowest_psnr", "mean_absolute_difference" in [0, 1],
        "skipped_steps": mean in a picture, "count": pictures}. Equal pictures count as 100 dB.

    Raises:
        InputError: no prompts, or a count below 1.
    """
    if not prompts or batch_size < 1:
        raise InputError(
            f"fidelity: there must be a prompt and a batch_size of at least 1, "
            f"got {len(prompts)} and {batch_size}"
        )
    pairs, skipped = [], []
    for begin in tqdm(range(0, len(prompts), batch_size), "fidelity", disable=not progress):
        part = list(prompts[begin : begin + batch_size])

        def draw(texts: list[str], first: int, **options: Any) -> Any:
            dice = [torch.Generator().manual_seed(seed + first + k) for k in range(len(texts))]
            options |= {"num_inference_steps": steps, "guidance_scale": guidance_scale}
            return pipe(texts, generator=dice, **options)

        truth = draw(part, begin, tier="faithful")
        found = draw(part, begin, tier=tier, step_cache=step_cache)
        pairs += zip(truth.images, found.images, strict=True)
        skipped += [len(each) for each in found.skipped_steps] or [0] * len(part)
    ratios = [min(psnr(*pair), MAX_PSNR) for pair in pairs]
    return {
        "psnr": float(np.mean(ratios)),
        "median_psnr": float(np.median(ratios)),
        "lowest_psnr": min(ratios),
        "mean_absolute_difference": float(np.mean([mean_absolute_difference(*p) for p in pairs])),
        "skipped_steps": float(np.mean(skipped)),
        "count": len(pairs),
    }


def fidelity_prompts(per_tag: int, seed: int = 0) -> list[str]:
    """Texts of the scenes evaluation, `per_tag` of each tag."""
    return [prompt.text for tag in TAGS for prompt in evaluation_prompts(tag, per_tag, seed)]
