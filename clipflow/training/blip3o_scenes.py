"""The scenes BLIP3-o before training: small, and heir of the finished UniLIP-scenes."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from clipflow.models.blip3o.config import TokenIds
from clipflow.models.blip3o.model import BLIP3oModel
from clipflow.models.blip3o.scenes import scenes_model
from clipflow.scenes.tokenizer import PAD, make_blip3o_tokenizer, make_tokenizer
from clipflow.training.inheritance import inherit, inherit_decoder
from clipflow.training.teacher import load_teacher


def token_ids(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """The ids that the model's configuration names."""
    names = ("<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "[IMG]")
    pad, im_end, image_pad, start, end, image = tokenizer.convert_tokens_to_ids([PAD, *names])
    return TokenIds(
        pad=pad,
        im_end=im_end,
        image_pad=image_pad,
        vision_start=start,
        vision_end=end,
        image_start=image,
    )


def untrained(seed: int = 0) -> BLIP3oModel:
    """The model that the recipes start from; the same for the same seed."""
    tokenizer = make_blip3o_tokenizer()
    model = scenes_model(len(tokenizer), token_ids(tokenizer), seed)
    teacher = load_teacher()
    inherit(model, tokenizer, teacher, make_tokenizer())
    model.decoder = inherit_decoder(teacher, model.config)
    return model
