"""Tokenizers of model folders: tokenizer.json, or the older files that Qwen2's is made of.

The older ones are vocab.json and merges.txt for the byte-level BPE, and added_tokens.json,
tokenizer_config.json and special_tokens_map.json for the tokens that stand beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from clipflow.errors import InputError

FAST_FILE = "tokenizer.json"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
ADDED_FILE = "added_tokens.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
LARGEST_FILE = 256 * 2**20
LARGEST_ID = 2**31
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; nothing but its files is read, and no code of it is run.

    Raises:
        InputError: there is none, or a file is broken; one line.
    """
    for name in (FAST_FILE, SETTINGS_FILE, SPECIAL_FILE):
        if (folder / name).exists():
            _read_object(folder / name)
    if (folder / FAST_FILE).is_file():
        return _built(folder / FAST_FILE, lambda: _from_fast(folder))
    if (folder / VOCABULARY_FILE).is_file() and (folder / MERGES_FILE).is_file():
        return _built(folder / VOCABULARY_FILE, lambda: _from_slow(folder))
    raise InputError(
        f"{folder}: a model folder must hold {FAST_FILE}, or {VOCABULARY_FILE} and {MERGES_FILE}, "
        "got no tokenizer"
    )


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    wanted: Mapping[str, int],
    optional: Mapping[str, int],
    vocab_size: int,
    folder: Path,
) -> None:
    """Refuse a tokenizer that is not the one the model was trained with.

    Args:
        tokenizer: of the model in `folder`.
        wanted: token -> id that the model's configuration says.
        optional: the same of tokens that it may lack; -1 where the model has none.
        vocab_size: of the model.
        folder: for messages.

    Raises:
        InputError: one of them is not one token with the model's id, or ids reach beyond the
            model's vocabulary.
    """
    ids = tokenizer.get_vocab()
    known = {token: own for token, own in optional.items() if own >= 0 and token in ids}
    for token, own in {**wanted, **known}.items():
        found = ids.get(token)
        if found == own:
            found = tokenizer(token, add_special_tokens=False)["input_ids"]
            if found == [own]:
                continue
        raise InputError(
            f"{folder}: the tokenizer must have {token} as the token {own}, as the model's "
            f"config.json says, got {'no such token' if found is None else found}"
        )
    largest = max(ids.values())
    if largest >= vocab_size:
        raise InputError(
            f"{folder}: the tokenizer's ids must be below the model's vocabulary of "
            f"{vocab_size}, got {largest}"
        )


def _built(path: Path, build) -> PreTrainedTokenizerBase:
    try:
        return build()
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception on broken files
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: cannot be read: {text or type(error).__name__}") from error


def _from_fast(folder: Path) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _from_slow(folder: Path) -> PreTrainedTokenizerBase:
    vocabulary = _ids(folder / VOCABULARY_FILE)
    settings = _read_object(folder / SETTINGS_FILE)
    settings = _read_object(folder / SPECIAL_FILE) | {
        name: value for name, value in settings.items() if value is not None
    }
    added = _added_tokens(folder, settings)
    known = vocabulary | added
    roles = {role: _content(settings[role]) for role in ROLES if settings.get(role) is not None}
    others = [_content(token) for token in settings.get("additional_special_tokens") or ()]
    for token in (*roles.values(), *others):
        if token not in known:
            raise InputError(f"{folder}: the special token {str(token)[:80]!r} must have an id")
    if len(set(known.values())) < len(known):
        raise InputError(f"{folder}: every token must have an id of its own, got one id twice")
    # Added tokens are in the vocabulary too, which puts them at their ids, gaps or not.
    tokenizer = Qwen2Tokenizer(
        vocab=known,
        merges=_merges(folder / MERGES_FILE),
        **(dict.fromkeys(ROLES) | roles),
    )
    flags = settings.get("added_tokens_decoder") or {}
    described = {entry["content"]: entry for entry in flags.values()}
    special = {*roles.values(), *others}
    for token in sorted(added, key=added.get):
        tokenizer.add_tokens([_added(token, described.get(token), token in special)])
    return tokenizer


def _added(token: str, described: Mapping | None, is_special: bool) -> AddedToken:
    """A token that is never split; its flags are those of tokenizer_config.json, if it has them."""
    if described is None:
        return AddedToken(token, special=is_special, normalized=False)
    return AddedToken(
        token, **{flag: described[flag] is True for flag in FLAGS if flag in described}
    )


def _added_tokens(folder: Path, settings: Mapping) -> dict[str, int]:
    """Token -> id, of both files that may hold them."""
    added = _ids(folder / ADDED_FILE) if (folder / ADDED_FILE).exists() else {}
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise InputError(f"{folder / SETTINGS_FILE}: added_tokens_decoder must be an object")
    for number, entry in decoder.items():
        token = _content(entry)
        if token is None or not number.isdecimal() or added.get(token, int(number)) != int(number):
            raise InputError(
                f"{folder}: {ADDED_FILE} and {SETTINGS_FILE} must give each added token one id, "
                f"got {str(number)[:20]!r} for {str(token)[:80]!r}"
            )
        added[token] = int(number)
    return added


def _content(token: object) -> str | None:
    """The text of a token that is written as itself or as an object; None if it is neither."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) and found else None


def _ids(path: Path) -> dict[str, int]:
    values = _read_object(path)
    if not all(type(number) is int and 0 <= number < LARGEST_ID for number in values.values()):
        raise InputError(f"{path}: must give each token a whole number from 0 on")
    return values


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise InputError(f"{path}: line {number} must have two parts, got {line[:40]!r}")
        merges.append((parts[0], parts[1]))
    if not merges:
        raise InputError(f"{path}: must hold merges, got none")
    return merges


def _read_object(path: Path) -> dict:
    """The JSON object in `path`; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def _read_text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > LARGEST_FILE:
        raise InputError(f"{path}: must be a file of at most {LARGEST_FILE >> 20} MiB")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: must be UTF-8 text, got {error}") from error
