"""Prints how far a call's peak memory is from its estimate; run by test_memory."""

import dataclasses
import json

import torch
from peak_memory import peak_of
from tiny_pipeline import tiny_pipeline

from clipflow.models.unilip import UniLIPModel
from clipflow.pipelines import CLIPFlowPipeline

PROMPT = "a red circle"
SIDE, IMAGES = 192, 4


def middle_sized_pipeline():
    """Wide enough for its activations to be much larger than what the allocator keeps."""
    tiny = tiny_pipeline()
    config = tiny.model.config
    dit = dataclasses.replace(config.dit, num_attention_heads=8, num_cross_attention_heads=8)
    decoder = dataclasses.replace(config.decoder, block_out_channels=(64, 128, 128, 128))
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
    call["num_images_per_prompt"] = IMAGES
    found = {}
    for output_type in ("latent", "pil"):
        found[output_type] = peak_of(
            lambda kind=output_type: pipe(PROMPT, output_type=kind, **call)
        )[0]
        pipe.plans.clear()
    sampled = estimate.plan + max(estimate.language, estimate.sampling)
    print(
        json.dumps({"sample": found["latent"] / sampled, "all": found["pil"] / estimate.variable})
    )


if __name__ == "__main__":
    main()
