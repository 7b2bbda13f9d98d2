"""The recorded fixture as a folder of the published form, with words for the recorded prompts."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from unilip_fixture import fixture_config, parity_dir, recorded_tensors, recorded_weights

from clipflow.pipelines.image_processor import ImageProcessor
from clipflow.testing import published_config

PROMPT, INSTRUCTION = "a prompt", "an instruction"


@dataclass(frozen=True, kw_only=True)
class RecordedPixels(ImageProcessor):
    """In place of the image processor: the recorded pixels, which are of no 8-bit picture."""

    pixel_values: Tensor

    def __call__(self, images: list) -> Tensor:
        return self.pixel_values.expand(len(images), -1, -1, -1)


def write_recorded_folder(folder: Path, **config_changes: object) -> Path:
    """Weights under the reference's own names, its config.json, and a tokenizer.json."""
    source = parity_dir()
    save_file(recorded_weights(source), folder / "model.safetensors", metadata={"format": "pt"})
    values = published_config(fixture_config(source), torch.float32) | config_changes
    (folder / "config.json").write_text(json.dumps(values))
    recorded_tokenizer(source).save(str(folder / "tokenizer.json"))
    return folder


def recorded_tokenizer(source: Path) -> Tokenizer:
    """Gives the pipeline's prompts the recorded ids: every piece of a template is some words.

    Rows are [cond, null]; what they begin and end with alike is the template.
    """
    tensors, tokens = recorded_tensors(source), fixture_config(source).tokens
    image = {tokens.img_start, tokens.img_end, tokens.img_context}
    rows = {}
    for tag in ("t2i", "edit"):
        pairs = zip(
            tensors[f"{tag}_left.input_ids"], tensors[f"{tag}_left.attention_mask"], strict=True
        )
        rows[tag] = [[n for n in ids[mask == 1].tolist() if n not in image] for ids, mask in pairs]
    head = shared_start(rows["t2i"][1], rows["edit"][1])
    tail = shared_start(rows["t2i"][1][::-1], rows["edit"][1][::-1])[::-1]
    pieces = {"<|im_start|>user\n": head, "<|im_end|>\n<|im_start|>assistant\n": tail}
    for tag, task, text in (
        ("t2i", "Generate an image", PROMPT),
        ("edit", "Edit the image", INSTRUCTION),
    ):
        cond, null = (row[len(head) : len(row) - len(tail)] for row in rows[tag])
        assert cond[: len(null)] == null
        # The reference's prompts were recorded without punctuation.
        pieces |= {f"{task}: {text}": cond, f"{task}.": null}
    return word_tokenizer(pieces, source)


def word_tokenizer(pieces: dict[str, list[int]], source: Path) -> Tokenizer:
    config = fixture_config(source)
    special = {
        "<img>": config.tokens.img_start,
        "</img>": config.tokens.img_end,
        "<IMG_CONTEXT>": config.tokens.img_context,
    }
    pad = config.tokens.img_context - 24
    named = {
        **special,
        "<|endoftext|>": pad,
        "<|im_start|>": pad + 1,
        "<|im_end|>": pad + 2,
    }
    taken = set(named.values())
    words = {f"w{n}": n for n in range(config.text.vocab_size) if n not in taken}
    tokenizer = Tokenizer(models.WordLevel({**words, **named}, unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(text, " " + " ".join(f"w{n}" for n in ids) + " ")
            for text, ids in pieces.items()
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def shared_start(first: list[int], second: list[int]) -> list[int]:
    """What both lists begin with."""
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return first[:count]
