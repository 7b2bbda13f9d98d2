"""The word-level tokenizer of the scenes world, with the special tokens of a family of models.

White space, line breaks among it, only separates words; letter case is folded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipflow.scenes.vocabulary import split_words, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<|endoftext|>"
UNKNOWN = "<unk>"
SPECIAL_TOKENS = (PAD, "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", UNKNOWN)
BLIP3O_SPECIAL_TOKENS = (
    PAD,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "[IMG]",
    UNKNOWN,
)
# Words of BLIP3-o's instructions that are none of the world's.
BLIP3O_SENTENCES = (
    "Please generate image based on the following caption:",
    "Please reconstruct the given image.",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """UniLIP's: a transformers tokenizer over `vocabulary()`; special tokens have the first ids."""
    return _tokenizer(SPECIAL_TOKENS, vocabulary())


def make_blip3o_tokenizer() -> PreTrainedTokenizerFast:
    """The same with BLIP3-o's special tokens, and the words of its instructions at the end."""
    words = vocabulary()
    more = {word for text in BLIP3O_SENTENCES for word in split_words(text)} - set(words)
    return _tokenizer(BLIP3O_SPECIAL_TOKENS, [*words, *sorted(more)])


def _tokenizer(special: tuple[str, ...], words: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate([*special, *words])}
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
    fast.add_special_tokens({"additional_special_tokens": list(special[1:-1])})
    return fast
