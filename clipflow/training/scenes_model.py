"""The scenes model before training: the small UniLIP and the tokenizer of its world."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from clipflow.models.unilip import UniLIPModel, scenes_model
from clipflow.models.unilip.config import TokenIds
from clipflow.scenes.tokenizer import PAD, make_tokenizer


def token_ids(tokenizer: PreTrainedTokenizerFast) -> TokenIds:
    """The ids that the model's configuration names."""
    pad, start, end, context, im_end = tokenizer.convert_tokens_to_ids(
        [PAD, "<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>"]
    )
    return TokenIds(pad=pad, img_start=start, img_end=end, img_context=context, im_end=im_end)


def untrained(seed: int = 0) -> UniLIPModel:
    """The model that the recipes start from; the same for the same seed."""
    tokenizer = make_tokenizer()
    return scenes_model(vocab_size=len(tokenizer), tokens=token_ids(tokenizer), seed=seed)
