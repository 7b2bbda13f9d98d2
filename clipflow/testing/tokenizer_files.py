"""Tokenizer files of Qwen2's form: byte-level BPE, with the special tokens of any family.

Bytes are the first 256 ids, a few merges follow, then words that no merge makes fill the vocabulary
up to the special tokens, which have the ids of the published folders (shifted in a smaller one).
Every text can be encoded, and decoded to itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from clipflow.errors import InputError

FORMS = ("slow", "fast")
# In the order of their ids; the model's <IMG_CONTEXT> fixes where they begin.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
    "[IMG]", "[/IMG]", "<image>",
)  # fmt: skip
# These are shown when an answer is decoded, as in Qwen2.5.
VISIBLE = frozenset(SPECIAL[14:22])
# What the 23 merges join, in their order; a space is written as in the vocabulary.
MERGES = (
    "Ġ Ġ", "i n", "Ġ t", "Ġ a", "h e", "r e", "o n", "Ġt he", "e r", "a t", "Ġ s", "Ġ c", "o r",
    "e n", "e d", "i t", "Ġ b", "Ġ o", "Ġ m", "in g", "Ġ p", "e s", "i s",
)  # fmt: skip
# The bytes and what the merges make; special tokens may follow from here on.
FIRST = 256 + len(MERGES)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(
    directory: str | Path, *, image_token_id: int = 151667, form: str = "slow"
) -> None:
    """Write the tokenizer's files into an existing folder.

    Args:
        directory: where.
        image_token_id: the id of <IMG_CONTEXT>; at least 303, where nothing fills the vocabulary.
        form: "slow" (vocab.json, merges.txt, added_tokens.json) or "fast" (tokenizer.json); both
            with special_tokens_map.json and tokenizer_config.json.

    Raises:
        InputError: another form, or an id that leaves no room for the bytes and merges.
    """
    before = SPECIAL.index("<IMG_CONTEXT>")
    least = FIRST + before
    if image_token_id < least:
        raise InputError(f"image_token_id must be at least {least}, got {image_token_id}")
    write_qwen_tokenizer(directory, SPECIAL, first=image_token_id - before, form=form)


def write_qwen_tokenizer(
    directory: str | Path,
    special: Sequence[str],
    *,
    first: int,
    form: str = "slow",
    chat_template: str | None = None,
) -> None:
    """Write a tokenizer's files with special tokens of any family.

    Args:
        directory: an existing folder.
        special: tokens in the order of their ids, "<|endoftext|>" and "<|im_end|>" among them.
        first: id of the first of them; at least 279, where nothing fills the vocabulary.
        form: "slow" or "fast" files, see `write_tokenizer`.
        chat_template: of tokenizer_config.json.

    Raises:
        InputError: another form, or an id that leaves no room for the bytes and merges.
    """
    if form not in FORMS:
        raise InputError(f"tokenizer must be one of {', '.join(FORMS)}, got {form!r}")
    directory, vocabulary = Path(directory), _vocabulary(first)
    ids = {token: first + place for place, token in enumerate(special)}
    if form == "slow":
        _write_json(directory / "vocab.json", vocabulary, indent=None)
        text = "\n".join(["#version: 0.2", *MERGES, ""])
        (directory / "merges.txt").write_text(text, encoding="utf-8")
        _write_json(directory / "added_tokens.json", ids)
    else:
        _fast_tokenizer(vocabulary, special).save(str(directory / "tokenizer.json"), pretty=False)
    _write_json(directory / "special_tokens_map.json", _special_map(special))
    settings = _tokenizer_config(ids)
    if chat_template is not None:
        settings["chat_template"] = chat_template
    _write_json(directory / "tokenizer_config.json", settings)


def byte_letters() -> list[str]:
    """The letter that stands for each byte, in the order of the ids of Qwen2's vocabulary.

    Printable bytes stand for themselves and come first; the others are letters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(68)]


def _vocabulary(size: int) -> dict[str, int]:
    words = [*byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    if size < len(words):
        raise InputError(f"first must be at least {len(words)}, got {size}")
    # No merge has a digit, so none makes these; as bytes they read " w279".
    words += [f"Ġw{place}" for place in range(len(words), size)]
    return {word: place for place, word in enumerate(words)}


def _fast_tokenizer(vocabulary: dict[str, int], special: Sequence[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens(
        [AddedToken(token, special=token not in VISIBLE, normalized=False) for token in special]
    )
    return tokenizer


def _special_map(special: Sequence[str]) -> dict[str, object]:
    return {
        "additional_special_tokens": [
            token for token in special if token not in VISIBLE and token != "<|endoftext|>"
        ],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def _tokenizer_config(special: dict[str, int]) -> dict[str, object]:
    decoder = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token not in VISIBLE,
        }
        for token, number in special.items()
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        **_special_map(tuple(special)),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": 1024,
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(path: Path, value: object, indent: int | None = 2) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
