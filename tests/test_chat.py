"""Conversations: how they are written, chosen words, where answers end, streaming, commands."""

import json

import pytest
import torch
from tiny_chat import TILE, said, tiny_chat, user
from tiny_chat import noise_picture as picture
from tiny_pipeline import tiny_pipeline

from clipflow.errors import InputError, SamplingError, ShapeError
from clipflow.models.language.reading import Reading
from clipflow.models.language.token_sampling import TokenSampling, row_dice
from clipflow.models.unilip.published import unilip_1b_config
from clipflow.pipelines.answers import Answer, AnswerEnd, text_pieces
from clipflow.pipelines.conversation import conversations_of
from clipflow.pipelines.generation_defaults import GenerationDefaults

SYSTEM = "Du är hjälpsam."


BATCH = [
    [user(picture(), "What is this?")],
    [said("user", "Hello there")],
    [user(picture(1), picture(), "Which?"), said("assistant", "That."), said("user", "Why?")],
]


@pytest.fixture(scope="module")
def pipe():
    return tiny_chat(system=SYSTEM)


def dice(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# How conversations are written


def written(pipe, messages, tiles):
    (conversation,) = conversations_of(messages)[0]
    return conversation.write(pipe.prompts, tiles)


def test_the_template(pipe):
    history = [
        user("Look: ", picture(), "and", picture(), "Which?"),
        said("assistant", "The first."),
        said("user", "Why?"),
    ]
    context = "<IMG_CONTEXT>"
    turns = (
        f"<|im_start|>user\nLook: <img>{context * 12}</img>\nand<img>{context * 4}</img>\nWhich?"
        "<|im_end|>\n<|im_start|>assistant\nThe first.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    assert written(pipe, history, [3, 1]) == own + turns
    other = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert written(pipe, [said("system", "Be brief."), *history], [3, 1]) == other + turns
    assert written(pipe, [said("system", ""), *history], [3, 1]) == turns


def test_a_question_about_one_picture_is_written_as_in_training():
    scenes = tiny_pipeline()
    wanted = (
        f"<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 64}</img>\nwhat is the background?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert scenes.prompts.question("what is the background?") == wanted
    assert written(scenes, [user(picture(), "what is the background?")], [1]) == wanted


def test_ask_is_a_chat_of_one_question(pipe):
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 20, "top_p": 0.9}
    for tiles in (1, 12):
        messages = [user(picture(), "What is this?")]
        chat = pipe.chat(messages, max_tiles=tiles, generator=dice(3), **options)
        assert chat == pipe.ask(
            picture(), "What is this?", max_tiles=tiles, generator=dice(3), **options
        )
    lists = pipe.ask([picture(), picture(1)], ["What?", "Why?"], max_new_tokens=4)
    assert lists == [
        pipe.ask(picture(), "What?", max_new_tokens=4),
        pipe.ask(picture(1), "Why?", max_new_tokens=4),
    ]


MALFORMED = [
    ("hello", r"messages must be a list of at least one message, got 'hello'"),
    ("hello " * 20, r"got '[helo ]{40}\.\.\.'"),
    ([], "got an empty list"),
    ([[]], r"messages\[0\] must be a list of at least one message, got an empty list"),
    ([[said("user", "a")], said("user", "b")], r"messages\[0\] must be a dict of role and content"),
    (["hello"], r"messages\[0\] must be a dict of role and content, got 'hello'"),
    ([{"role": "user"}], "the keys 'role' and 'content', got 'role'"),
    ([said("user", "a") | {"name": "b"}], "got 'role', 'content', 'name'"),
    ([said("tool", "a")], "role must be one of system, user, assistant, got 'tool'"),
    ([said("user", "a"), said("system", "b")], "a system message must be the first"),
    ([said(["user"], "a")], "role must be one of system, user, assistant, got list"),
    ([said(torch.zeros(2), "a")], "role must be one of system, user, assistant, got Tensor"),
    ([said("system", torch.zeros(2))], "content must be a text or a list, got Tensor"),
    ([said("user", [torch.zeros(2)])], "type 'text' or 'image', got Tensor"),
    ([said("user", [{"type": torch.zeros(2)}])], "type 'text' or 'image', got Tensor"),
    ([said("system", "a")], "must end with a message of the user, got 'system'"),
    ([said("user", "a"), said("assistant", "b")], "end with a message of the user, got 'as"),
    ([said("user", "")], r"messages\[0\]: content\[0\] must not be empty"),
    ([said("user", [])], r"messages\[0\]: content must be a text or a list, got an empty list"),
    ([said("user", None)], "content must be a text or a list, got NoneType"),
    ([said("user", ["a"])], r"content\[0\] must be a dict of type 'text' or 'image', got 'a'"),
    ([said("user", [{"type": "video"}])], "type 'text' or 'image', got 'video'"),
    ([said("user", [{"type": "image"}])], "of type 'image' must have the key 'image', got 'type'"),
    ([said("user", [{"type": "text", "image": "a"}])], "must have the key 'text', got 'type', 'i"),
    ([said("user", [{"type": "text", "text": 3}])], "must be a text, got int"),
    ([user("a <|im_end|>")], r"must not contain the marker '<\|im_end\|>'"),
    ([user("<image>\na")], "the marker '<image>'"),
    ([user("a"), said("assistant", "<img>"), user("b")], r"messages\[1\]: content\[0\].*'<img>'"),
    ([user(picture(), "a"), user(picture()) | {"role": "assistant"}, user("b")], "only a user's"),
    ([said("user", [{"type": "image", "image": "no-such.png"}])], "no such image file"),
    ([user("a" * 2048)], "at most 2047 tokens in all .the model reads 2048, and 1 follow"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "message"), MALFORMED, ids=[m[:30] for _, m in MALFORMED])
def test_malformed_messages_are_refused_in_one_line(pipe, messages, message):
    with pytest.raises(InputError, match=message) as caught:
        pipe.chat(messages, max_new_tokens=1)
    assert "\n" not in str(caught.value)


BAD_OPTIONS = [
    ({"max_tiles": 0}, "max_tiles must be a whole number of at least 1, got 0"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
    ({"temperature": float("inf")}, "temperature must be a number, got inf"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
    ({"top_p": "1"}, "top_p must be a number, got '1'"),
    ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
    ({"repetition_penalty": "1"}, "repetition_penalty must be a number, got '1'"),
    ({"top_k": 2.0}, "top_k must be a whole number of at least 0, got 2.0"),
    ({"stop": ""}, "stop must be a text that is not empty, or a list of them, got ''"),
    ({"stop": [3]}, "stop must be"),
    ({"temperature": 1.0, "generator": dice(0, 1)}, "a list of 1 .one for each conversation"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:30])
def test_bad_options_are_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe.chat([said("user", "Hi")], **{"max_new_tokens": 1, **options})


def test_one_conversation_is_streamed(pipe):
    with pytest.raises(InputError, match="one conversation, got a list of 3"):
        pipe.chat(BATCH, stream=True)


# Which token comes next


def reference(logits, temperature, top_k, top_p):
    """Probabilities, token by token, as the definitions say."""
    chances = [0.0] * len(logits)
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = order[: top_k or len(order)]
    weights = {t: torch.tensor(logits[t] / temperature).double().exp().item() for t in kept}
    total, together = sum(weights.values()), 0.0
    nucleus = []
    for token in kept:
        if together / total < top_p:
            nucleus.append(token)
        together += weights[token]
    rest = sum(weights[token] for token in nucleus)
    for token in nucleus:
        chances[token] = weights[token] / rest
    return torch.tensor(chances, dtype=torch.float64)


KINDS = [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 6, 0.7), (2.0, 100, 0.95), (1, 3, 1e-9)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), KINDS)
def test_drawn_tokens_have_the_probabilities_of_the_definition(temperature, top_k, top_p):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    sampling = TokenSampling(temperature=temperature, top_k=top_k, top_p=top_p)
    wanted = reference(logits.tolist(), temperature, top_k, top_p)
    (found,) = sampling.probabilities(logits[None])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)

    count = 6000
    drawn = sampling.choose(logits.expand(count, -1), dice(7) * count)
    shares = torch.bincount(drawn, minlength=12) / count
    assert bool((shares[wanted == 0] == 0).all())
    deviation = (wanted * (1 - wanted) / count).sqrt()
    assert bool(((shares - wanted).abs() <= 5 * deviation + 1e-12).all())


def test_probabilities_are_those_of_transformers():
    from transformers.generation import logits_process as theirs

    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * 3
    scores = theirs.TemperatureLogitsWarper(0.6)(None, logits)
    scores = theirs.TopPLogitsWarper(0.9)(None, theirs.TopKLogitsWarper(40)(None, scores))
    found = TokenSampling(temperature=0.6, top_k=40, top_p=0.9).probabilities(logits)
    torch.testing.assert_close(found.float(), scores.softmax(-1), atol=1e-6, rtol=1e-4)


def test_the_likeliest_token_is_the_limit():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(2))
    greedy = TokenSampling().choose(logits, [])
    assert torch.equal(greedy, logits.argmax(-1))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-300}):
        sampling = TokenSampling(**{"temperature": 1.0, **options})
        assert torch.equal(sampling.choose(logits, dice(*range(5))), greedy)


def test_logits_that_are_not_finite_are_an_error():
    for value in (float("nan"), float("inf")):
        with pytest.raises(SamplingError, match="not finite"):
            TokenSampling().choose(torch.tensor([[0.0, value]]), [])


# Seeds


OPTIONS = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 50}


def test_seeds_give_the_same_answer_in_any_batch(pipe):
    together = pipe.chat(BATCH, generator=dice(0, 1, 2), **OPTIONS)
    assert together == pipe.chat(BATCH, generator=dice(0, 1, 2), **OPTIONS)
    for index, messages in enumerate(BATCH):
        assert pipe.chat(messages, generator=dice(index), **OPTIONS) == together[index]
        (one,) = dice(index)
        assert pipe.chat(messages, generator=one, **OPTIONS) == together[index]
    backwards = pipe.chat(BATCH[::-1], generator=dice(2, 1, 0), **OPTIONS)
    assert backwards == together[::-1]
    assert pipe.chat(BATCH, generator=dice(3, 4, 5), **OPTIONS) != together
    same = pipe.chat([BATCH[0]] * 3, generator=dice(0)[0], **OPTIONS)
    assert len(set(same)) > 1 and same[0] == together[0]


def test_without_a_generator_the_global_one_is_used(pipe):
    state = torch.random.get_rng_state()
    first = pipe.chat(BATCH[1], **OPTIONS)
    torch.random.set_rng_state(state)
    assert pipe.chat(BATCH[1], **OPTIONS) == first


def test_greedy_answers_draw_nothing(pipe):
    (one,) = dice(0)
    before = one.get_state()
    pipe.chat(BATCH[1], max_new_tokens=2, generator=one)
    assert torch.equal(one.get_state(), before)
    (other,) = row_dice(one, 1)
    assert not torch.equal(one.get_state(), before) and other.device.type == "cpu"


# Where answers end, and streaming


def spoken(pipe, text, *, stop=(), limit=100):
    """An answer, and the steps that make it say `text` and then end."""
    end_token = pipe.model.config.tokens.im_end
    end = AnswerEnd(tokens=frozenset({end_token}), texts=tuple(stop), max_new_tokens=limit)
    answer = Answer(pipe.tokenizer, end)

    def steps():
        for token in [*pipe.prompts.ids(text), end_token]:
            answer.add(token)
            yield
            if answer.done:
                return

    return answer, steps()


SPOKEN = {
    "blanks around": ("  a café\n\n au lait \n", (), "a café\n\n au lait"),
    "characters of several bytes": ("雲 är ☁️, 🙂", (), "雲 är ☁️, 🙂"),
    "a stop text": ("one END two", ("END",), "one"),
    "nearly a stop text": ("one EN two EDEND", ("END",), "one EN two ED"),
    "the first to be complete": ("a b c d", ("c", "b c d", "x"), "a b"),
    "the earliest of one token": ("a bc d", ("c", "bc"), "a"),
    "it is the beginning": ("END one", ("END",), ""),
    "of a blank": ("one two\nthree", ("\n",), "one two"),
    "within itself": ("aaab", ("aab",), "a"),
    "of several bytes": ("är det 雲 så", ("雲",), "är det"),
    "never said": ("one two", ("three", "two "), "one two"),
    "nothing": (" \n ", (), ""),
}


@pytest.mark.parametrize("case", SPOKEN)
def test_pieces_join_to_the_answer_and_hold_no_stop_text(pipe, case):
    text, stop, wanted = SPOKEN[case]
    answer, steps = spoken(pipe, text, stop=stop)
    pieces = list(text_pieces(answer, steps))
    assert "".join(pieces) == answer.text == wanted and answer.done
    assert all(pieces) and not any(text in wanted for text in stop)


def test_pieces_come_as_soon_as_they_are_sure(pipe):
    answer, steps = spoken(pipe, "so EN, é", stop=["END"])
    assert list(text_pieces(answer, steps)) == ["s", "o", " EN,", " é"]


def test_the_longest_answer(pipe):
    answer, steps = spoken(pipe, "one two", limit=5)
    assert "".join(text_pieces(answer, steps)) == answer.text == "one t" and answer.done


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["greedy", "sampled"])
def test_answers_end_before_stop_texts_streamed_or_not(pipe, options):
    options = {**options, "max_new_tokens": 24}
    for index, messages in enumerate(BATCH):
        whole = pipe.chat(messages, generator=dice(index), **options)
        stream = pipe.chat(messages, generator=dice(index), stream=True, **options)
        assert "".join(stream) == whole and whole
        stop = [whole[len(whole) // 2 :][:2], whole[-3:]]
        cut = pipe.chat(messages, generator=dice(index), stop=stop, **options)
        assert whole.startswith(cut) and not any(text in cut for text in stop)
        stream = pipe.chat(messages, generator=dice(index), stop=stop, stream=True, **options)
        assert "".join(stream) == cut
    together = pipe.chat(BATCH, generator=dice(0, 1, 2), stop=stop, **options)
    assert together[2] == cut and not any(text in answer for text in stop for answer in together)


def test_a_folder_may_name_tokens_that_end_answers(pipe, tmp_path):
    config = pipe.model.config
    first = Reading(
        pipe.model, *pipe.prompts.rows([written(pipe, BATCH[1], [])], pipe.device), None, room=1
    ).next_logits.argmax().item()  # fmt: skip
    for given in (first, [first, 3]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
        defaults = GenerationDefaults.from_folder(tmp_path, config)
        assert first in defaults.eos_token_ids
        (tmp_path / "generation_config.json").write_text(defaults.to_json())
        assert GenerationDefaults.from_folder(tmp_path, config) == defaults
        other = tiny_chat(system=SYSTEM)
        other.defaults = defaults
        assert other.chat(BATCH[1], max_new_tokens=5) == "" != pipe.chat(BATCH[1], max_new_tokens=5)
    for bad in (-1, 10**6, "2", [True], {}):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(InputError, match="eos_token_id must be whole numbers below"):
            GenerationDefaults.from_folder(tmp_path, config)


def test_a_folder_may_name_the_penalty_of_repetition(pipe, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3}))
    other = tiny_chat(system=SYSTEM)
    other.defaults = GenerationDefaults.from_folder(tmp_path, pipe.model.config)
    (tmp_path / "generation_config.json").write_text(other.defaults.to_json())
    assert GenerationDefaults.from_folder(tmp_path, pipe.model.config) == other.defaults
    options = {"max_new_tokens": 12}
    wanted = pipe.chat(BATCH[1], repetition_penalty=1.3, **options)
    assert other.chat(BATCH[1], **options) == wanted != pipe.chat(BATCH[1], **options)
    assert other.chat(BATCH[1], repetition_penalty=1, **options) == pipe.chat(BATCH[1], **options)
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": "a"}))
    with pytest.raises(InputError, match="repetition_penalty must be a number"):
        GenerationDefaults.from_folder(tmp_path, pipe.model.config)


def test_the_longest_answer_of_a_model_that_does_not_say(pipe):
    assert pipe.defaults.max_new_tokens == 2048 // 16
    assert GenerationDefaults.from_folder(None, unilip_1b_config()).max_new_tokens == 512


# What is read once


def counted(pipe, read):
    """What `read` returns, and (rows, tokens) of each pass through the language model."""
    passes = []
    first = pipe.model.language_model.layers[0].self_attn.q_proj
    hook = first.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[:2]))
    result = read()
    hook.remove()
    return result, [tuple(shape) for shape in passes]


@pytest.mark.parametrize("images", [(), (picture(),), (picture(), picture(1))], ids=len)
def test_a_common_beginning_is_read_once(pipe, images):
    beginning = [user(*images, "Look at it for a good while. " * 4), said("assistant", "Yes.")]
    batch = [[*beginning, said("user", text)] for text in ("Why?", "What?", "How is it?")]
    wanted = [pipe.chat(messages, max_new_tokens=5) for messages in batch]
    answers, passes = counted(pipe, lambda: pipe.chat(batch, max_new_tokens=5))
    (one, shared), (three, rest) = passes[:2]
    assert (one, three) == (1, 3) and shared > 4 * rest and answers == wanted


def test_other_pictures_of_a_common_beginning(pipe):
    other = picture(1)
    text = "Look at it for a good while and tell me "
    batch = [[user(image, text + end)] for image in (picture(), other) for end in ("why", "what?")]
    wanted = [pipe.chat(messages, max_new_tokens=5) for messages in batch]
    answers, passes = counted(pipe, lambda: pipe.chat(batch, max_new_tokens=5))
    assert [rows for rows, _ in passes[:2]] == [2, 4] and answers == wanted


def test_beginnings_end_before_a_picture_that_only_some_rows_have(pipe):
    text = "One of these pictures or both of them, I do not know which it was. " * 2
    same = [user(text, picture(0, (TILE, TILE)))]
    more = [user(text, picture(0, (2 * TILE, TILE)))]
    batch = [same, more, same]
    wanted = [pipe.chat(messages, max_new_tokens=5) for messages in batch]
    answers, passes = counted(pipe, lambda: pipe.chat(batch, max_new_tokens=5))
    assert answers == wanted and passes[0][0] in (2, 3)


@torch.no_grad()
def test_no_beginning_ends_in_a_picture(pipe):
    context = pipe.model.config.tokens.img_context
    row = [7, 8, 9, 10, 11, 12, 13, 14, context, context, context, context]
    ids = torch.tensor([[0, 0, *row], [*row, 15, 16], [*row, 17, 18]])
    mask = torch.tensor([[0] * 2 + [1] * 12, [1] * 14, [1] * 14])
    features = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    pictures = torch.zeros(3, dtype=torch.int64)
    reading, passes = counted(
        pipe, lambda: Reading(pipe.model, ids, mask, features, room=1, pictures=pictures)
    )
    assert passes == [(1, 8), (3, 6)]
    for index in range(3):
        alone = ids[index : index + 1, mask[index].bool()]
        wanted = Reading(pipe.model, alone, torch.ones_like(alone), features, room=1).next_logits
        torch.testing.assert_close(reading.next_logits[index], wanted[0], atol=1e-4, rtol=1e-4)


def test_chat_in_bfloat16():
    half = tiny_chat(system=SYSTEM).to(torch.bfloat16)
    answers = half.chat(BATCH, generator=dice(0, 1, 2), **OPTIONS)
    assert all(isinstance(answer, str) for answer in answers) and any(answers)


@torch.no_grad()
def test_reading_wants_as_many_pictures_as_there_are_places(pipe):
    ids, mask = pipe.prompts.rows([written(pipe, BATCH[0], [2])], pipe.device)
    features = torch.zeros(2, 4, 64)
    Reading(pipe.model, ids, mask, features, room=1)
    for wrong, pictures in ((features[:1], None), (None, None), (features, torch.tensor([0]))):
        with pytest.raises(ShapeError, match=r"image positions for \d pictures"):
            Reading(pipe.model, ids, mask, wrong, room=1, pictures=pictures)
