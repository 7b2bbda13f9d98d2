"""Understanding, from messages to tokens, is that of transformers' Qwen2.5-VL, same weights."""

import math
import random

import pytest
import torch
from tiny_chat import noise_picture, said, user
from tiny_qwen import SPECIAL, qwen_tokenizer, tiny_qwen, transformers_qwen
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

from clipflow.models.language.reading import Reading
from clipflow.pipelines import CLIPFlowPipeline
from clipflow.pipelines.blip3o_prompts import BLIP3oPrompts
from clipflow.pipelines.conversation import conversations_of
from clipflow.pipelines.qwen_pictures import QwenImageProcessor, WholeSet

NEW_TOKENS = 8
# Qwen2.5-VL's own, for pictures and text.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WIDE, TALL, SMALL = (
    noise_picture(seed, size) for seed, size in enumerate([(170, 60), (40, 230), (60, 50)])
)
CONVERSATIONS = {
    "one picture": [user(WIDE, "What is this?")],
    "two pictures": [user("First: ", SMALL, "second: ", WIDE, "Which is darker?")],
    "a tall picture": [user("Read it. ", TALL)],
    "several turns": [
        said("system", "Be brief."),
        user(SMALL, "What is this?"),
        said("assistant", "A cloud, perhaps."),
        user(TALL, "And this, är det ett moln? 雲"),
        said("assistant", "No."),
        said("user", "Why?"),
    ],
    "text alone": [said("user", "Who are you?")],
}


class PicturesProcessor(Qwen2_5_VLProcessor):
    """Without videos, whose processor needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer, **options):
        self.image_token, self.video_token = "<|image_pad|>", "[IMG]"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, **options)


@pytest.fixture(scope="module")
def processor():
    tokenizer = qwen_tokenizer()
    tokenizer.padding_side = "left"
    return PicturesProcessor(Qwen2VLImageProcessorPil(), tokenizer, chat_template=TEMPLATE)


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request):
    return tiny_qwen(tied=request.param == "tied")


@pytest.fixture(scope="module")
def theirs(model):
    return transformers_qwen(model)


def processed(processor, conversations):
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def prepared(model, conversations):
    """Our (ids, mask, pictures)."""
    prompts = BLIP3oPrompts(qwen_tokenizer(), model.config)
    pictures = WholeSet(QwenImageProcessor.from_config(model.config))
    texts = [
        conversation.write(prompts, pictures.add(conversation.images))
        for conversation in conversations_of(conversations)[0]
    ]
    return *prompts.rows(texts, model.device), pictures


def read(model, conversations, room=NEW_TOKENS):
    ids, mask, pictures = prepared(model, conversations)
    features = pictures.features(model, range(len(pictures.pictures)))
    places = torch.tensor([place for places in pictures.places for place in places]).long()
    return Reading(model, ids, mask, features, room=room, pictures=places, grids=pictures.grids)


def near(found, wanted):
    """Within 1e-4 of the largest logit."""
    assert found.dtype == wanted.dtype == torch.float32
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@torch.no_grad()
def generated(theirs, inputs, **options):
    """(new tokens of each row up to the end, logits of each step [B, V])."""
    pad, end = (qwen_tokenizer().convert_tokens_to_ids(SPECIAL[i]) for i in (0, 2))
    output = theirs.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows], output.logits


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_and_patches_are_theirs(model, processor, name):
    inputs = processed(processor, [CONVERSATIONS[name]])
    ids, mask, pictures = prepared(model, [CONVERSATIONS[name]])
    assert torch.equal(ids, inputs["input_ids"]) and torch.equal(mask, inputs["attention_mask"])
    assert qwen_tokenizer().decode(ids[0]).startswith("<|im_start|>system\n")
    assert bool(pictures.pictures) == ("pixel_values" in inputs) == (name != "text alone")
    if pictures.pictures:
        read = [pictures.processor.patches(picture) for picture in pictures.pictures]
        patches, grids = (torch.cat(parts) for parts in zip(*read, strict=True))
        assert torch.equal(patches, inputs["pixel_values"])
        assert torch.equal(grids, inputs["image_grid_thw"])


@torch.no_grad()
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_reading_on_gives_their_logits_and_tokens(model, theirs, processor, name):
    (wanted,), logits = generated(theirs, processed(processor, [CONVERSATIONS[name]]))
    reading = read(model, [CONVERSATIONS[name]])
    for step, token in enumerate(wanted):
        near(reading.next_logits, logits[step])
        assert reading.next_logits.argmax().item() == token
        reading.extend(torch.tensor([token]))
    assert len(set(wanted)) > 1


@torch.no_grad()
def test_a_left_padded_batch_gives_their_tokens(model, theirs, processor):
    batch = list(CONVERSATIONS.values())
    inputs = processed(processor, batch)
    assert not inputs["attention_mask"][:, 0].all()
    wanted, logits = generated(theirs, inputs)
    reading = read(model, batch)
    for step in range(NEW_TOKENS):
        said = [row for row, tokens in enumerate(wanted) if step < len(tokens)]
        near(reading.next_logits[said], logits[step][said])
        tokens = reading.next_logits.argmax(-1)
        assert tokens[said].tolist() == [wanted[row][step] for row in said]
        reading.extend(tokens)


@torch.no_grad()
def test_logits_of_the_whole_prompts_are_theirs(model, theirs, processor):
    inputs = processed(processor, list(CONVERSATIONS.values()))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    *_, pictures = prepared(model, list(CONVERSATIONS.values()))
    order = [place for places in pictures.places for place in places]
    features = torch.cat(pictures.features(model, order))
    found = model.logits(ids, mask, features, [pictures.grids[place] for place in order])
    real = mask.bool()
    near(found[real], theirs(**inputs).logits[real])


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repeated_tokens_are_as_unlikely_as_theirs(model, theirs, processor, penalty):
    pipe = CLIPFlowPipeline(model, qwen_tokenizer())
    for messages in CONVERSATIONS.values():
        inputs = processed(processor, [messages])
        (wanted,), _ = generated(theirs, inputs, repetition_penalty=penalty)
        answer = pipe.chat(messages, max_new_tokens=NEW_TOKENS, repetition_penalty=penalty)
        assert answer == pipe.tokenizer.decode(wanted, skip_special_tokens=True).strip()
    batch = list(CONVERSATIONS.values())
    together = pipe.chat(batch, max_new_tokens=NEW_TOKENS, repetition_penalty=penalty)
    assert together[-1] == answer and together != pipe.chat(batch, max_new_tokens=NEW_TOKENS)


def test_positions_are_theirs_wherever_pictures_are(model, theirs):
    dice, image = random.Random(0), model.image_token
    rows, grids = [], []
    for _ in range(12):
        row, own = [1] * dice.randint(0, 3), []
        for _ in range(dice.randint(0, 3)):
            own.append((dice.randint(1, 5), dice.randint(1, 5)))
            row += [image] * math.prod(own[-1]) + [1] * dice.randint(1, 6)
        if own and dice.random() < 0.5:
            row = row[: len(row) - row[::-1].index(image)]  # it ends in the picture
        rows.append(row or [1])
        grids += own
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    thw = torch.tensor([[1, 2 * height, 2 * width] for height, width in grids])
    wanted, _ = theirs.model.get_rope_index(
        ids, (ids == image).int(), image_grid_thw=thw, attention_mask=mask
    )
    order = mask.argsort(dim=-1, descending=True, stable=True)
    for given in ((ids, mask), (ids.gather(1, order), mask.gather(1, order))):
        found = model.positions(*given, grids)
        assert torch.equal(found[:, given[1].bool()], wanted[:, mask.bool()])


@torch.no_grad()
def test_rows_and_columns_of_pictures_matter(model):
    ids, mask, pictures = prepared(model, [CONVERSATIONS["a tall picture"]])
    features = pictures.features(model, [0])
    grids, (grid,) = {"theirs": pictures.grids, "counted": None}, pictures.grids
    grids["turned"] = [grid[::-1]]
    found = [
        Reading(model, ids, mask, features, room=0, grids=grid).next_logits
        for grid in grids.values()
    ]
    for other in found[1:]:
        assert (other - found[0]).abs().max() > 0.01 * found[0].abs().max()
