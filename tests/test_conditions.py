"""Conditions of prompts: equal to the model's own, computed once, forgotten with the weights."""

import threading

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from clipflow.errors import InputError, ShapeError
from clipflow.pipelines.conditions import ConditionCache
from clipflow.pipelines.prompts import UnknownWordWarning

TEXTS = ["a red circle", None, "a photo of a blue square left of a green star"]


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def pictures():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Calls:
    """How often `module` is called, and with how many rows."""

    def __init__(self, module):
        self.rows = []
        self.handle = module.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        given = args[0] if args else kwargs["inputs_embeds"]
        self.rows.append(len(given))


def plain(pipe, written, features=None):
    """One prompt through the model, without cache or padding."""
    ids, mask = pipe.prompts.rows([written], pipe.device)
    with torch.no_grad():
        return pipe.model.encode_condition(ids, mask, features).hidden[0]


def test_text_to_image_equals_the_model(pipe):
    for found, text in zip(pipe.conditions.text_to_image(TEXTS), TEXTS, strict=True):
        wanted = plain(pipe, pipe.prompts.text_to_image(text))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_edit_equals_the_model(pipe, pictures):
    texts = ["remove the square", None]
    for found, picture, text in zip(
        pipe.conditions.edit(pictures, texts), pictures, texts, strict=True
    ):
        features = pipe.model.encode_image(picture[None])
        wanted = plain(pipe, pipe.prompts.edit(text), features)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_one_by_one_has_the_same_bits_in_any_company(pipe, pictures):
    encode = pipe.conditions.text_to_image
    together = encode(TEXTS, one_by_one=True)
    edits = ["remove the square", "make the circle green"]
    edited = pipe.conditions.edit(pictures, edits, one_by_one=True)
    pipe.conditions.text_to_image(TEXTS)  # those of a batch are kept apart
    pipe.condition_cache.clear()
    for found, text in zip(together, TEXTS, strict=True):
        assert torch.equal(found, encode([text], one_by_one=True)[0])
    alone = pipe.conditions.edit(pictures[1:], edits[1:], one_by_one=True)
    assert torch.equal(alone[0], edited[1])


def test_a_prompt_is_encoded_once(pipe):
    calls = Calls(pipe.model.language_model)
    first = pipe.conditions.text_to_image(["a star", None, "a star"])
    assert calls.rows == [2] and first[0] is first[2]
    again = pipe.conditions.text_to_image([None, "two rings", "a star"])
    assert calls.rows == [2, 1] and again[0] is first[1] and again[2] is first[0]
    statistics = pipe.condition_cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.entries) == (2, 3, 3)
    assert statistics.bytes == sum(c.nbytes for c in (*first[:2], again[1]))
    assert all(c.untyped_storage().nbytes() == c.nbytes for c in again)  # no view of a batch


def test_an_edit_is_known_by_its_picture_and_text(pipe, pictures):
    towers, models = Calls(pipe.model.vision_tower), Calls(pipe.model.language_model)
    both = pipe.conditions.edit(pictures[[0, 0, 1]], ["remove it", None, None])
    assert towers.rows == [2] and models.rows == [3]
    assert not torch.equal(both[1], both[2])
    known = pipe.conditions.edit(pictures[[1, 0]].clone(), [None, "remove it"])
    assert towers.rows == [2] and known[0] is both[2] and known[1] is both[0]
    pipe.conditions.edit(pictures[:1] + 1, ["remove it"])
    assert towers.rows == [2, 1]


def test_the_budget_holds(pipe):
    size = pipe.conditions.text_to_image([None])[0].nbytes
    cache = pipe.condition_cache
    cache.max_bytes = 3 * size + size // 2  # the others are longer than the null prompt
    pipe.conditions.text_to_image(["a star"])
    pipe.conditions.text_to_image([None])
    pipe.conditions.text_to_image(["two rings", "a cross"])
    held = cache.statistics()
    assert held.bytes <= cache.max_bytes and held.evictions == 1 and held.entries == 3
    calls = Calls(pipe.model.language_model)
    pipe.conditions.text_to_image([None, "a cross"])
    assert not calls.rows
    cache.max_bytes = 0
    assert cache.statistics().entries == 0 and cache.statistics().bytes == 0
    pipe.conditions.text_to_image([None])
    assert cache.statistics().entries == 0


def to_half_and_back(pipe):
    pipe.to(torch.bfloat16).to(torch.float32)


def load(pipe):
    pipe.model.load_state_dict(tiny_pipeline(seed=1).model.state_dict())


def assign(pipe):
    pipe.model.load_state_dict(tiny_pipeline(seed=1).model.state_dict(), assign=True)


def step(pipe):
    optimizer = torch.optim.SGD(pipe.model.llm_connector.parameters(), lr=0.5)
    for parameter in pipe.model.llm_connector.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("change", [to_half_and_back, load, assign, step])
def test_other_weights_other_conditions(pipe, change):
    (before,) = pipe.conditions.text_to_image(["a star"])
    change(pipe)
    (after,) = pipe.conditions.text_to_image(["a star"])
    assert not torch.equal(before, after)
    wanted = plain(pipe, pipe.prompts.text_to_image("a star"))
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-5)
    assert pipe.condition_cache.statistics().entries == 1  # nothing of the old weights is kept


def test_other_dtypes_are_other_conditions(pipe):
    (full,) = pipe.conditions.text_to_image(["a star"])
    with torch.autocast("cpu", torch.bfloat16):
        (mixed,) = pipe.conditions.text_to_image(["a star"])
    assert full.dtype == torch.float32 and mixed.dtype == torch.bfloat16
    assert pipe.conditions.text_to_image(["a star"])[0] is full
    assert pipe.to(torch.bfloat16).conditions.text_to_image(["a star"])[0].dtype == torch.bfloat16


def test_a_cache_may_be_shared(pipe):
    other = tiny_pipeline(seed=1)
    other.conditions.cache = pipe.condition_cache
    (first,) = pipe.conditions.text_to_image(["a star"])
    assert not torch.equal(first, other.conditions.text_to_image(["a star"])[0])
    assert pipe.conditions.text_to_image(["a star"])[0] is first


def test_threads_share_a_cache_within_its_budget():
    cache = ConditionCache(max_bytes=50 * 4)
    wrong = []

    def work(seed):
        for count in range(400):
            number = (seed * 7 + count) % 80
            found = cache.get((number,))
            if found is None:
                cache.put((number,), torch.full((1,), float(number)))
            elif found.item() != number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statistics = cache.statistics()
    assert not wrong and statistics.hits + statistics.misses == 8 * 400
    assert statistics.entries * 4 == statistics.bytes <= cache.max_bytes


def test_unknown_words_are_warned_about_in_every_call(pipe):
    for _ in range(2):
        with pytest.warns(UnknownWordWarning, match="zeppelin"):
            pipe.conditions.text_to_image(["a zeppelin"])


def test_bad_calls_say_what_is_wrong(pipe, pictures):
    with pytest.raises(InputError, match="tokens in all"):
        pipe.conditions.text_to_image(["a " * 3000])
    with pytest.raises(ShapeError, match=r"must be \[1, 3, S, S\], got \[2, 3, 64, 64\]"):
        pipe.conditions.edit(pictures, ["remove it"])
