"""A tiny UniLIP with random weights and the scenes tokenizer, for tests of what surrounds it."""

import dataclasses

import torch

from clipflow.models.unilip import UniLIPModel, scenes_config
from clipflow.models.unilip.config import TokenIds
from clipflow.pipelines import CLIPFlowPipeline
from clipflow.scenes.tokenizer import make_tokenizer


def tiny_pipeline(seed: int = 0) -> CLIPFlowPipeline:
    """Two layers of everything; the pictures are 64 px, and as random as the weights."""
    tokenizer = make_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    tokens = TokenIds(
        pad=tokenizer.pad_token_id,
        img_start=ids("<img>"),
        img_end=ids("</img>"),
        img_context=ids("<IMG_CONTEXT>"),
        im_end=ids("<|im_end|>"),
    )
    full = scenes_config(len(tokenizer), tokens)
    config = dataclasses.replace(
        full,
        vision=dataclasses.replace(full.vision, num_hidden_layers=1),
        text=dataclasses.replace(full.text, num_hidden_layers=2),
        dit=dataclasses.replace(full.dit, num_layers=2),
        connect_layer=1,
        unilip_factor=2.0,
        default_guidance_scale=2.0,
        output_size=56,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    pipeline = CLIPFlowPipeline(UniLIPModel(config), tokenizer)
    torch.random.set_rng_state(state)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
