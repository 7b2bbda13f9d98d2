"""A tiny UniLIP with random weights that reads bytes: any text, pictures of 4 tokens a tile."""

import dataclasses
from collections.abc import Sequence

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clipflow.models.unilip import UniLIPModel, scenes_config
from clipflow.models.unilip.config import TokenIds
from clipflow.pipelines import CLIPFlowPipeline

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
TILE = 56  # pixels


def byte_tokenizer(special: Sequence[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """A token for every byte, and special ones, of which the first is the padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0])
    fast.add_special_tokens({"additional_special_tokens": list(special[1:])})
    return fast


def tiny_chat(*, seed: int = 0, tied: bool = False, system: str = "") -> CLIPFlowPipeline:
    """Two layers of vision, three of language; `system` is the model's own system message."""
    tokenizer = byte_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
    names = ("pad", "", "im_end", "img_start", "img_end", "img_context")
    tokens = TokenIds(**{name: index for name, index in zip(names, ids, strict=True) if name})
    full = scenes_config(len(tokenizer), tokens)
    config = dataclasses.replace(
        full,
        vision=dataclasses.replace(
            full.vision,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=TILE,
            patch_size=14,
            shuffle=2,
        ),
        text=dataclasses.replace(
            full.text,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            max_position_embeddings=2048,
            tie_word_embeddings=tied,
        ),
        dit=dataclasses.replace(full.dit, num_layers=1),
        connect_layer=1,
        system_message=system,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = UniLIPModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".ls1", ".ls2")):
                weight.uniform_(0.5, 1.5)
        # Else answers would be one token over and over, whatever is asked and shown.
        model.language_model.embed_tokens.weight.normal_(std=0.3)
        model.multi_modal_projector[3].weight.normal_(std=0.3)
        model.language_model.norm.weight[::2] = -1
        for layer in model.language_model.layers:
            attention = layer.self_attn
            for part in (attention.q_proj, attention.k_proj):
                part.weight.mul_(8)
            for part in (attention.v_proj, attention.o_proj, layer.mlp.down_proj):
                part.weight.mul_(3)
    pipe = CLIPFlowPipeline(model, tokenizer)
    torch.random.set_rng_state(state)
    return pipe


def noise_picture(seed=0, size=(90, 40)):
    """A picture of few large pixels, the same for the same seed."""
    noise = torch.randint(0, 256, (6, 5, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy()).resize(size)


def user(*parts):
    """A user's message of texts and pictures."""
    texts = [isinstance(part, str) for part in parts]
    pairs = zip(parts, texts, strict=True)
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part} if is_text else {"type": "image", "image": part}
            for part, is_text in pairs
        ],
    }


def said(role, text):
    """A message of text alone."""
    return {"role": role, "content": text}
