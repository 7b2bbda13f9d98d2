"""The scenes models: before training, as a recipe left them, and as a pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerFast

from clipflow.models.blip3o.model import BLIP3oModel
from clipflow.models.folders.checkpoint import read_config
from clipflow.models.unilip import UniLIPModel, scenes_model
from clipflow.models.unilip.config import TokenIds
from clipflow.pipelines import CLIPFlowPipeline
from clipflow.pipelines.qwen_pictures import QwenImageProcessor
from clipflow.scenes.tokenizer import PAD, make_blip3o_tokenizer, make_tokenizer

TOKENIZERS = {UniLIPModel: make_tokenizer, BLIP3oModel: make_blip3o_tokenizer}


def token_ids(tokenizer: PreTrainedTokenizerFast) -> TokenIds:
    """The ids that the configuration of UniLIP names."""
    pad, start, end, context, im_end = tokenizer.convert_tokens_to_ids(
        [PAD, "<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>"]
    )
    return TokenIds(pad=pad, img_start=start, img_end=end, img_context=context, im_end=im_end)


def untrained(seed: int = 0) -> UniLIPModel:
    """The UniLIP that the recipes start from; the same for the same seed."""
    tokenizer = make_tokenizer()
    return scenes_model(vocab_size=len(tokenizer), tokens=token_ids(tokenizer), seed=seed)


def load(folder: Path) -> nn.Module:
    """The model in `folder`, of either family."""
    multimodal = str(read_config(folder).get("model_type", "")).endswith("blip3o")
    return (BLIP3oModel if multimodal else UniLIPModel).from_pretrained(folder)


def pipeline_of(model: nn.Module) -> CLIPFlowPipeline | None:
    """The model with the tokenizer of its family; None where it is of none."""
    make = TOKENIZERS.get(type(model))
    if make is None:
        return None
    processor = scenes_pictures(model) if isinstance(model, BLIP3oModel) else None
    return CLIPFlowPipeline(model, make(), image_processor=processor)


def scenes_pictures(model: BLIP3oModel) -> QwenImageProcessor:
    """Pictures of the area of a scene, of which alone the model has seen any."""
    area = model.config.image_size**2
    processor = QwenImageProcessor.from_config(model.config)
    return dataclasses.replace(processor, min_pixels=area, max_pixels=area)
