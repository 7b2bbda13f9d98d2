"""Calls of a pipeline that end in Qwen2.5-VL: streams, seeds, labels, pictures of any shape."""

import io
import json

import pytest
import torch
from PIL import Image
from tiny_chat import noise_picture, said, tiny_chat, user
from tiny_qwen import qwen_tokenizer, tiny_qwen, transformers_qwen

from clipflow.cli import main
from clipflow.errors import InputError
from clipflow.pipelines import CLIPFlowPipeline, readers
from clipflow.pipelines.prompts import LABEL_QUESTION
from clipflow.testing import write_blip3o_folder

WIDE, TALL, SMALL = (
    noise_picture(seed, size) for seed, size in enumerate([(170, 60), (60, 170), (60, 50)])
)
BATCH = [
    [user(WIDE, "What is this?")],
    [said("user", "Hello there")],
    [user(SMALL, WIDE, "Which?"), said("assistant", "That."), said("user", "Why?")],
]
OPTIONS = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 50}


@pytest.fixture
def pipe():
    return CLIPFlowPipeline(tiny_qwen(), qwen_tokenizer())


def dice(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def counted(pipe, part, read):
    """What `read` returns, and the shapes of what came into `part` of the model."""
    shapes = []
    hook = part.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:-1])))
    result = read()
    hook.remove()
    return result, shapes


def first_layer(pipe):
    return pipe.model.language_model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["greedy", "sampled"])
def test_streams_join_to_the_answer(pipe, options):
    options = {**options, "max_new_tokens": 16}
    for index, messages in enumerate(BATCH):
        whole = pipe.chat(messages, generator=dice(index), **options)
        pieces = list(pipe.chat(messages, generator=dice(index), stream=True, **options))
        assert "".join(pieces) == whole and len(pieces) > 1


def test_seeds_give_the_same_answer_in_any_batch(pipe):
    together = pipe.chat(BATCH, generator=dice(0, 1, 2), **OPTIONS)
    for index, messages in enumerate(BATCH):
        assert pipe.chat(messages, generator=dice(index), **OPTIONS) == together[index]
    assert pipe.chat(BATCH[::-1], generator=dice(2, 1, 0), **OPTIONS) == together[::-1]
    assert pipe.chat(BATCH, generator=dice(3, 4, 5), **OPTIONS) != together


def test_ask_is_a_chat_of_one_question(pipe):
    chat = pipe.chat([user(TALL, "What is this?")], generator=dice(3), **OPTIONS)
    assert pipe.ask(TALL, "What is this?", generator=dice(3), **OPTIONS) == chat
    lists = pipe.ask([TALL, WIDE], ["What?", "Why?"], max_new_tokens=4)
    assert lists == [
        pipe.ask(TALL, "What?", max_new_tokens=4),
        pipe.ask(WIDE, "Why?", max_new_tokens=4),
    ]


def test_half_precision():
    pipe = CLIPFlowPipeline(tiny_qwen(), qwen_tokenizer()).to(torch.bfloat16)
    answers = pipe.chat(BATCH, generator=dice(0, 1, 2), **OPTIONS)
    assert all(isinstance(answer, str) for answer in answers) and any(answers)


LABELS = ["a red star", "a red sail", "blue globe", "blue"]


@torch.no_grad()
def test_labels_are_ranked_by_the_likelihood_of_their_tokens(pipe, monkeypatch):
    theirs = transformers_qwen(pipe.model)
    end, images = pipe.model.config.tokens.im_end, [WIDE, TALL, SMALL, WIDE]

    def score(image, label):
        patches, grid = pipe.image_processor.patches(image)
        text = pipe.prompts.chat(
            [("user", pipe.prompts.picture(int(grid.prod()) // 4) + LABEL_QUESTION)]
        )
        prompt, answer = pipe.prompts.ids(text), [*pipe.prompts.ids(label), end]
        ids = torch.tensor([prompt + answer])
        logits = theirs(
            input_ids=ids,
            pixel_values=patches,
            image_grid_thw=grid,
            mm_token_type_ids=(ids == pipe.model.image_token).int(),
        ).logits[0, len(prompt) - 1 : -1]
        chances = logits.double().log_softmax(-1)
        return chances.gather(-1, torch.tensor(answer)[:, None]).sum()

    for at_once in (1, 16):  # rows are of one length, and of several
        monkeypatch.setattr(readers.WholeReader, "pictures_at_once", lambda *_, n=at_once: n)
        found = pipe.classify(images, LABELS)
        for image, ranking in zip(images, found, strict=True):
            scores = torch.stack([score(image, label) for label in LABELS])
            chances = dict(zip(LABELS, scores.softmax(-1).tolist(), strict=True))
            assert dict(ranking) == pytest.approx(chances, rel=1e-3, abs=0)
            assert [c for _, c in ranking] == sorted(dict(ranking).values(), reverse=True)
    assert dict(found[0]) != pytest.approx(dict(found[1]), rel=0.1, abs=0)


def test_few_pictures_are_read_at_once_where_they_may_be_large(pipe):
    counts = [
        pipe.reader.pictures_at_once(readers.Detail(max_pixels=pixels))
        for pixels in (784 * 10_000, None, 784)
    ]
    assert counts == [1, 4, 16]


def test_a_picture_goes_through_the_vision_tower_once(pipe):
    flat, upright = (Image.new("RGB", size, "red") for size in ((112, 56), (56, 112)))
    assert flat.tobytes() == upright.tobytes()
    visual = pipe.model.visual.patch_embed
    first, shapes = counted(
        pipe, visual, lambda: pipe.ask([flat, upright, flat.copy()], "what?", max_new_tokens=4)
    )
    assert shapes == [(32,), (32,)] and first[0] == first[2]
    again, shapes = counted(pipe, visual, lambda: pipe.ask(flat, "what?", max_new_tokens=4))
    assert shapes == [] and again == first[0]
    assert pipe.feature_cache.statistics().entries == 2
    with torch.no_grad():
        pipe.model.visual.merger.mlp[2].bias.add_(1)
    _, shapes = counted(pipe, visual, lambda: pipe.ask(flat, "what?", max_new_tokens=4))
    assert shapes == [(32,)]


def test_a_common_beginning_is_read_once(pipe):
    """Also of pictures that are not the same, if they are of as many tokens."""
    beginning = "Look at it for a good while. " * 3
    questions = [f"{beginning}{end}" for end in ("Why?", "What is it?")]
    batch = [[user(image, text)] for image in (WIDE, TALL) for text in questions]
    wanted = [pipe.chat(messages, max_new_tokens=6) for messages in batch]
    answers, shapes = counted(pipe, first_layer(pipe), lambda: pipe.chat(batch, max_new_tokens=6))
    (pictures, shared), (rows, rest) = shapes[:2]
    assert (pictures, rows) == (2, 4) and shared > 4 * rest
    assert answers == wanted and len(set(wanted)) == 4


def test_no_beginning_ends_in_a_picture(pipe):
    batch = [[user(beginning := "Look. " * 20, image, "Why?")] for image in (WIDE, SMALL, WIDE)]
    wanted = [pipe.chat(messages, max_new_tokens=6) for messages in batch]
    answers, shapes = counted(pipe, first_layer(pipe), lambda: pipe.chat(batch, max_new_tokens=6))
    assert shapes[0][0] == 1 and shapes[0][1] > len(beginning) and answers == wanted


def test_max_pixels_reduces_pictures(pipe):
    answer, shapes = counted(
        pipe, pipe.model.visual.patch_embed, lambda: pipe.ask(WIDE, "what?", max_new_tokens=4)
    )
    assert shapes == [(12 * 4,)] and isinstance(answer, str)
    fewer = {"max_pixels": 3 * 784}
    for call in (
        lambda: pipe.ask(WIDE, "what?", max_new_tokens=4, **fewer),
        lambda: pipe.chat(BATCH[0], max_new_tokens=4, **fewer),
        lambda: pipe.classify(WIDE, LABELS, **fewer),
    ):
        pipe.feature_cache.clear()
        assert counted(pipe, pipe.model.visual.patch_embed, call)[1] == [(2 * 4,)]


REFUSED = [
    ({"max_tiles": 1}, "max_tiles is for models that cut pictures into tiles; this one sees"),
    ({"max_pixels": 783}, "max_pixels must be a whole number of at least 784, got 783"),
    ({"max_pixels": 1e6}, "max_pixels must be a whole number of at least 784, got 1000000.0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_details_that_cannot_be_are_refused(pipe, options, message):
    for image in (WIDE, None):
        content = [user(image, "Hi")] if image else [said("user", "Hi")]
        with pytest.raises(InputError, match=message):
            pipe.chat(content, max_new_tokens=1, **options)


def test_tiles_have_no_pixels():
    with pytest.raises(InputError, match="max_pixels is for models that see pictures at their own"):
        tiny_chat().ask(SMALL, "what?", max_pixels=10**6)


@pytest.mark.parametrize("text", ["<|image_pad|>", "a [IMG]", "<|vision_start|>", "<image>\nb"])
def test_markers_are_the_familys(pipe, text):
    for call in (
        lambda: pipe.ask(SMALL, text),
        lambda: pipe.chat([said("user", text)]),
        lambda: pipe.classify(SMALL, [text]),
        lambda: pipe.classify(SMALL, LABELS, question=text),
    ):
        with pytest.raises(InputError, match="must not contain the marker"):
            call()
    assert isinstance(pipe.ask(SMALL, "an <img>", max_new_tokens=1), str)  # UniLIP's


def test_requests_for_pictures(pipe):
    begin = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n[IMG]"
    wanted = f"{begin}Please generate image based on the following caption: a dog{end}"
    prompts, place = pipe.prompts, f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>\n"
    assert prompts.text_to_image("a dog") == wanted
    assert prompts.ids(wanted)[-1] == pipe.model.config.tokens.image_start
    assert prompts.text_to_image(None) == " [IMG]"
    assert prompts.edit("make it red") == f"{begin}{place}make it red{end}"
    assert prompts.edit(None) == f"{begin}{place}Please reconstruct the given image.{end}"


def test_folders_through_commands(tmp_path, capsys, monkeypatch):
    """A published folder, and the one that the pipeline writes of it."""
    folder = write_blip3o_folder(tmp_path / "published", decoder=False, dtype=torch.float32)
    loaded = CLIPFlowPipeline.from_pretrained(folder)
    assert loaded.defaults.repetition_penalty == 1.05
    assert loaded.image_processor.max_pixels == 12845056
    (tmp_path / "own").mkdir()
    loaded.save_pretrained(tmp_path / "own")
    WIDE.save(tmp_path / "wide.png")
    SMALL.save(tmp_path / "small.png")
    wide, small = str(tmp_path / "wide.png"), str(tmp_path / "small.png")
    asked = [user(WIDE, SMALL, "which?")]
    first = loaded.chat([user(WIDE, "hi")], max_new_tokens=4)
    turns = [user(WIDE, "hi"), *([said("assistant", first)] if first else []), said("user", "so?")]
    chatted = [first, loaded.chat(turns, max_new_tokens=4)]
    for model in (folder, tmp_path / "own"):

        def run(*command, model=model):
            assert main([*command, "--model", str(model)]) == 0
            return capsys.readouterr().out

        limit = ["--max-new-tokens", "4"]
        assert run("ask", wide, small, "which?", *limit).rstrip("\n") == loaded.chat(
            asked, max_new_tokens=4
        )
        assert run("ask", wide, "which?", "--stream", "--max-pixels", "3136", *limit).rstrip(
            "\n"
        ) == loaded.ask(WIDE, "which?", max_pixels=3136, max_new_tokens=4)
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\nso?\n"))
        assert run("chat", wide, *limit) == "".join(f"{answer}\n" for answer in chatted)
        found = json.loads(run("classify", wide, "--labels", "a,b", "--json"))
        assert found == [list(pair) for pair in loaded.classify(WIDE, ["a", "b"])]
