"""Prints how far a call's peak memory is from its estimate; a process of its own, for test_memory.

Linux alone says what the peak was and lets it be set back.
"""

import ctypes
import dataclasses
import gc
import json
from pathlib import Path

import torch
from tiny_pipeline import tiny_pipeline

from clipflow.models.unilip import UniLIPModel
from clipflow.pipelines import CLIPFlowPipeline

PROMPT = "a red circle"
SIDE, IMAGES = 192, 4


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_the_peak():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def middle_sized_pipeline():
    """Wide enough for its activations to be much larger than what the allocator keeps."""
    tiny = tiny_pipeline()
    config = tiny.model.config
    dit = dataclasses.replace(config.dit, num_attention_heads=8, num_cross_attention_heads=8)
    decoder = dataclasses.replace(config.decoder, block_out_channels=(48, 96, 128, 128))
    model = UniLIPModel(dataclasses.replace(config, dit=dit, decoder=decoder))
    pipe = CLIPFlowPipeline(model, tiny.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main():
    torch.manual_seed(0)
    pipe = middle_sized_pipeline()
    call = {"num_inference_steps": 1, "height": SIDE, "width": SIDE}
    tokens = len(pipe.prompts.ids(pipe.prompts.text_to_image(PROMPT)))
    estimate = pipe.memory_estimate(num_images=IMAGES, prompt_tokens=tokens, **call)
    pipe(PROMPT, num_inference_steps=1)  # libraries and threads set themselves up
    pipe.plans.clear()
    pipe.condition_cache.clear()
    found = {}
    for output_type in ("latent", "pil"):
        forget_the_peak()
        before = resident("VmRSS")
        pipe(PROMPT, num_images_per_prompt=IMAGES, output_type=output_type, **call)
        found[output_type] = resident("VmHWM") - before
        pipe.plans.clear()
    sampled = estimate.plan + max(estimate.language, estimate.sampling)
    print(
        json.dumps({"sample": found["latent"] / sampled, "all": found["pil"] / estimate.variable})
    )


if __name__ == "__main__":
    main()
