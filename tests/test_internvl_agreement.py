"""Understanding, from messages to tokens, is that of transformers' InternVL with the same weights.

Their processor writes the prompt and cuts the tiles, their model reads and generates.
"""

import re

import pytest
import torch
from PIL import Image
from tiny_chat import SPECIAL, TILE, byte_tokenizer, tiny_chat
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from unilip_fixture import load_fixture

from clipflow.models.language.reading import Reading
from clipflow.models.unilip.model import _qwen2_config
from clipflow.pipelines import CLIPFlowPipeline
from clipflow.pipelines.conversation import conversations_of
from clipflow.pipelines.tiling import TileSet
from clipflow.testing import write_unilip_folder

SYSTEM = "你是书生·万象。"
NEW_TOKENS = 10

# (pattern of our parameter names, transformers' name); qkv are three matrices there.
NAMES = (
    (r"vision_tower\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (
        r"vision_tower\.embeddings\.position_embedding",
        "model.vision_tower.embeddings.position_embeddings",
    ),
    (
        r"vision_tower\.embeddings\.patch_embedding\.(.*)",
        r"model.vision_tower.embeddings.patch_embeddings.projection.\1",
    ),
    (r"(vision_tower\.encoder\.layer)s\.(\d+)\.ls(\d)", r"model.\1.\2.lambda_\3"),
    (r"(vision_tower\.encoder\.layer)s\.(\d+)\.norm1\.(.*)", r"model.\1.\2.layernorm_before.\3"),
    (r"(vision_tower\.encoder\.layer)s\.(\d+)\.norm2\.(.*)", r"model.\1.\2.layernorm_after.\3"),
    (r"(vision_tower\.encoder\.layer)s\.(\d+)\.mlp\.(.*)", r"model.\1.\2.mlp.\3"),
    (
        r"(vision_tower\.encoder\.layer)s\.(\d+)\.attn\.proj\.(.*)",
        r"model.\1.\2.attention.projection_layer.\3",
    ),
    (
        r"(vision_tower\.encoder\.layer)s\.(\d+)\.attn\.qkv\.(.*)",
        r"model.\1.\2.attention.{qkv}_proj.\3",
    ),
    (r"multi_modal_projector\.0\.(.*)", r"model.multi_modal_projector.layer_norm.\1"),
    (r"multi_modal_projector\.1\.(.*)", r"model.multi_modal_projector.linear_1.\1"),
    (r"multi_modal_projector\.3\.(.*)", r"model.multi_modal_projector.linear_2.\1"),
    (r"(language_model\..*)", r"model.\1"),
    (r"(lm_head\..*)", r"\1"),
)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def picture(seed, width, height):
    noise = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(seed))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    return image.resize((width, height), Image.Resampling.BILINEAR)


SQUARE, OTHER, WIDE = picture(0, 60, 50), picture(1, 40, 44), picture(2, 400, 130)


def user(*parts):
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part}
            for part in parts
        ],
    }


CONVERSATIONS = {
    "one picture": [user(SQUARE, "What is this?")],
    "several pictures": [user("First: ", SQUARE, "second: ", OTHER, "Which is darker?")],
    "tiles and thumbnail": [user(WIDE, "Read the sign.")],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        user(OTHER, "What is this?"),
        {"role": "assistant", "content": "A cloud, perhaps."},
        user(WIDE, "And this, är det ett moln? 雲"),
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ],
    "only text": [{"role": "user", "content": "Who are you?"}],
}


class PicturesProcessor(InternVLProcessor):
    """Without videos, whose processor needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer, **options):
        super().__init__(image_processor, tokenizer, **options)


@pytest.fixture(scope="module")
def processor():
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    named = {
        "start_image": "<img>",
        "end_image": "</img>",
        "context_image": "<IMG_CONTEXT>",
        "video": "<|endoftext|>",
    }
    for name, token in named.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    tiles = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return PicturesProcessor(tiles, tokenizer, chat_template=TEMPLATE, image_seq_length=4)


@pytest.fixture(scope="module", params=["tied", "untied"])
def pipe(request):
    pipe = tiny_chat(tied=request.param == "tied", system=SYSTEM)
    pipe.model.requires_grad_(False)
    return pipe


@pytest.fixture(scope="module")
def internvl(pipe):
    return internvl_of(pipe.model)


def internvl_of(model):
    """Transformers' model with the sizes and the weights of ours."""
    vision, text, tokens = model.config.vision, model.config.text, model.config.tokens
    theirs = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=vision.hidden_size,
                num_hidden_layers=vision.num_hidden_layers,
                num_attention_heads=vision.num_attention_heads,
                intermediate_size=vision.intermediate_size,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                layer_norm_eps=vision.layer_norm_eps,
                attention_bias=True,
            ),
            text_config=_qwen2_config(text),
            image_token_id=tokens.img_context,
            image_seq_length=model.config.latent_side**2,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    ).eval()
    state = internvl_state(model)
    if text.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    theirs.load_state_dict(state)  # every one of theirs is given
    return theirs


def internvl_state(model):
    """The weights of the parts that understand, under transformers' names."""
    state = {}
    parts = ("vision_tower.", "multi_modal_projector.", "language_model.", "lm_head.")
    for name, weight in model.state_dict().items():
        if not name.startswith(parts):
            continue
        (new,) = [re.sub(old, new, name) for old, new in NAMES if re.fullmatch(old, name)]
        if "{qkv}" in new:
            for letter, third in zip("qkv", weight.chunk(3), strict=True):
                state[new.replace("{qkv}", letter)] = third
        else:
            state[new] = weight
    return state


def with_system(messages):
    given = messages[0]["role"] == "system"
    return messages if given else [{"role": "system", "content": SYSTEM}, *messages]


def processed(processor, conversations):
    return processor.apply_chat_template(
        [with_system(messages) for messages in conversations],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def prepared(pipe, conversations):
    """Our (ids, mask, pixels of the tiles in order)."""
    tiles = TileSet(pipe.image_processor, 12)
    texts = [
        conversation.write(pipe.prompts, tiles.add(conversation.images))
        for conversation in conversations_of(conversations)[0]
    ]
    ids, mask = pipe.prompts.rows(texts, pipe.device)
    order = [tiles.pictures[place] for places in tiles.places for place in places]
    return ids, mask, pipe.image_processor(order) if order else None


def near(found, wanted):
    """Within 1e-4 of the largest logit."""
    assert found.dtype == wanted.dtype == torch.float32
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@torch.no_grad()
def generated(internvl, inputs):
    """(new tokens of each row up to the end, logits of each step [B, V])."""
    pad, end = (byte_tokenizer().convert_tokens_to_ids(SPECIAL[i]) for i in (0, 2))
    output = internvl.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows], output.logits


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_and_tiles_are_theirs(pipe, processor, name):
    inputs = processed(processor, [CONVERSATIONS[name]])
    ids, mask, pixels = prepared(pipe, [CONVERSATIONS[name]])
    assert torch.equal(ids, inputs["input_ids"]) and torch.equal(mask, inputs["attention_mask"])
    assert (pixels is None) == ("pixel_values" not in inputs) == (name == "only text")
    if pixels is not None:
        torch.testing.assert_close(pixels, inputs["pixel_values"].float(), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits_of_the_whole_prompt_are_theirs(pipe, internvl, processor, name):
    inputs = processed(processor, [CONVERSATIONS[name]])
    pixels = inputs.get("pixel_values")
    features = None if pixels is None else pipe.model.encode_image(pixels)
    found = pipe.model.logits(inputs["input_ids"], inputs["attention_mask"], features)
    wanted = internvl(**inputs).logits
    near(found, wanted)
    if features is not None:  # and the pictures matter
        other = pipe.model.logits(inputs["input_ids"], inputs["attention_mask"], features.flip(1))
        assert (other - wanted).abs().max() > 0.05 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_reading_on_gives_their_logits_and_tokens(pipe, internvl, processor, name):
    inputs = processed(processor, [CONVERSATIONS[name]])
    (wanted,), logits = generated(internvl, inputs)
    ids, mask, pixels = prepared(pipe, [CONVERSATIONS[name]])
    features = None if pixels is None else pipe.model.encode_image(pixels)
    reading = Reading(pipe.model, ids, mask, features, room=NEW_TOKENS)
    for step, token in enumerate(wanted):
        near(reading.next_logits, logits[step])
        assert reading.next_logits.argmax().item() == token
        reading.extend(torch.tensor([token]))
    text = pipe.tokenizer.decode(wanted, skip_special_tokens=True).strip()
    assert len(set(wanted)) > 1
    assert pipe.chat(CONVERSATIONS[name], max_new_tokens=NEW_TOKENS) == text


@torch.no_grad()
def test_a_left_padded_batch_gives_their_tokens_and_each_row_as_alone(pipe, internvl, processor):
    batch = list(CONVERSATIONS.values())
    inputs = processed(processor, batch)
    wanted, logits = generated(internvl, inputs)
    ids, mask, pixels = prepared(pipe, batch)
    assert torch.equal(ids, inputs["input_ids"]) and torch.equal(mask, inputs["attention_mask"])
    assert not mask[:, 0].all()
    reading = Reading(pipe.model, ids, mask, pipe.model.encode_image(pixels), room=1)
    near(reading.next_logits, logits[0])
    texts = [pipe.tokenizer.decode(row, skip_special_tokens=True).strip() for row in wanted]
    answers = pipe.chat(batch, max_new_tokens=NEW_TOKENS)
    assert answers == texts
    assert answers == [pipe.chat(messages, max_new_tokens=NEW_TOKENS) for messages in batch]


@torch.no_grad()
def test_ask_sees_one_tile(pipe, internvl, processor):
    inputs = processor.apply_chat_template(
        with_system([user(WIDE, "Read the sign.")]),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images_kwargs": {"crop_to_patches": False}},
    )
    assert len(inputs["pixel_values"]) == 1
    (wanted,), _ = generated(internvl, inputs)
    text = pipe.tokenizer.decode(wanted, skip_special_tokens=True).strip()
    assert pipe.ask(WIDE, "Read the sign.", max_new_tokens=NEW_TOKENS) == text
    tiled = pipe.ask(WIDE, "Read the sign.", max_new_tokens=NEW_TOKENS, max_tiles=12)
    alike = pipe.chat(CONVERSATIONS["tiles and thumbnail"], max_new_tokens=NEW_TOKENS)
    assert tiled == alike != text


@torch.no_grad()
def test_the_recorded_model_agrees_at_its_published_picture_size():
    """448 px, 256 tokens a tile; two pictures of two tiles and one, then a text."""
    model = load_fixture().model
    dice = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 448, 448, generator=dice)
    tokens, text = model.config.tokens, torch.randint(5, 200, (12,), generator=dice).tolist()
    assert model.config.latent_side**2 == 256
    shown = [
        token
        for tiles in (2, 1)
        for token in (tokens.img_start, *[tokens.img_context] * (256 * tiles), tokens.img_end)
    ]
    ids = torch.tensor([text[:6] + shown + text[6:]])
    mask = torch.ones_like(ids)
    output = internvl_of(model).generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=model.config.text.vocab_size,
        pad_token_id=tokens.pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    reading = Reading(model, ids, mask, model.encode_image(pixels), room=6)
    for token, logits in zip(output.sequences[0, ids.shape[1] :], output.logits, strict=True):
        near(reading.next_logits, logits)
        assert reading.next_logits.argmax() == token
        reading.extend(token[None])


@torch.no_grad()
def test_a_published_folder_converses_as_theirs(tmp_path):
    """Its own tokenizer and system message, 448 px, three tiles and the thumbnail."""
    write_unilip_folder(tmp_path, size="tiny", dtype=torch.float32)
    pipe = CLIPFlowPipeline.from_pretrained(tmp_path)
    messages = [user(picture(3, 900, 300), "Vad är det? 雲")]
    ids, mask, pixels = prepared(pipe, [messages])
    assert pixels.shape == (4, 3, 448, 448)
    assert int((ids == pipe.model.config.tokens.img_context).sum()) == 4 * 256
    assert pipe.tokenizer.decode(ids[0]).startswith("<|im_start|>system\n你是书生·万象，英文名是")
    end, pad = pipe.model.config.tokens.im_end, pipe.model.config.tokens.pad
    output = internvl_of(pipe.model).generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )
    wanted = pipe.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert pipe.chat(messages, max_new_tokens=NEW_TOKENS) == wanted != ""
