"""The word-level tokenizer of the scenes world, with UniLIP's special tokens.

White space, line breaks among it, only separates words; letter case is folded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipflow.scenes.vocabulary import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<|endoftext|>"
UNKNOWN = "<unk>"
SPECIAL_TOKENS = (PAD, "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", UNKNOWN)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A transformers tokenizer over `vocabulary()`; the special tokens have the first ids."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *vocabulary()]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token="<|im_end|>",
        unk_token=UNKNOWN,
        padding_side="left",
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:-1])})
    return fast
