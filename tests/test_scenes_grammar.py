"""The language of the scenes: what is said is true, held-out pairs stay out, words are known."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from clipflow.scenes import (
    EDIT_KINDS,
    QUESTION_KINDS,
    TAGS,
    Scene,
    SceneObject,
    caption,
    check_answer,
    check_edit,
    check_prompt,
    draw_edit,
    draw_scene,
    evaluation_edits,
    evaluation_prompts,
    evaluation_questions,
    is_held_out,
    labels,
    make_prompt,
    plain_form,
    questions,
    random_scene,
    same_description,
    sample_asked_scene,
    sample_edit,
    sample_prompted_scene,
    sample_question,
    sample_relation,
    split_words,
    vocabulary,
)
from clipflow.scenes.prompts import Prompt


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def obj(color: str, shape: str, cell: int) -> SceneObject:
    return SceneObject(shape, color, cell, (12 + 20 * (cell % 3), 12 + 20 * (cell // 3)), 15)


@pytest.mark.parametrize("tag", TAGS)
def test_prompts_are_true_of_their_scenes_and_false_of_others(tag, rng):
    for _ in range(300):
        prompt = make_prompt(rng, tag)
        scene = draw_scene(rng, prompt, training=False)
        assert check_prompt(prompt, scene)
        extra = obj("red", "star", next(c for c in range(9) if c not in taken(scene)))
        assert not check_prompt(prompt, Scene(scene.background, (*scene.objects, extra)))
        assert not check_prompt(prompt, Scene(scene.background, scene.objects[1:]))


def taken(scene: Scene) -> set[int]:
    return {o.cell for o in scene.objects}


def test_relations_mean_the_dominant_axis():
    prompt = Prompt("position", "", (("red", "circle"), ("blue", "square")), "left of")
    for cell, wanted in [(5, True), (2, True), (1, False), (7, False), (3, False), (8, True)]:
        scene = Scene("gray", (obj("blue", "square", cell), obj("red", "circle", 3)))
        if cell != 3:
            assert check_prompt(prompt, scene) == wanted, cell


def test_reasoning_forms_say_what_they_mean(rng):
    texts = {}
    while len(texts) < 4:
        prompt = make_prompt(rng, "reasoning", prefix=False)
        texts[prompt.form] = (prompt.text, plain_form(prompt))
    assert " plus " in texts["sum"][0] and texts["sum"][1].split()[0] in ("two", "three", "four")
    assert "in the colour of" in texts["riddle"][0]
    assert texts["as_many"][0].startswith("as many ")
    second, first = texts["placed"][0].split(" with ")[0], texts["placed"][1]
    assert first.endswith(second)


def test_articles_and_plurals(rng):
    texts = {sample_prompted_scene(rng, tag)[0] for tag in TAGS for _ in range(400)}
    words = [text.split() for text in texts]
    pairs = {pair for text in words for pair in itertools.pairwise(text)}
    assert ("an", "orange") in pairs and ("a", "orange") not in pairs
    assert any("crosses" in text for text in words) and "crosss" not in itertools.chain(*words)
    assert any(text.startswith("a photo of ") for text in texts)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_edits_hold_after_and_not_before(kind, rng):
    for _ in range(200):
        edit = draw_edit(rng, kind)
        assert edit.kind == kind
        assert check_edit(edit, edit.after)
        assert not check_edit(edit, edit.before)
        assert edit.seen != any(is_held_out(s.objects) for s in (edit.before, edit.after))
        assert 1 <= len(edit.after.objects) <= 4
        other = "sand" if edit.after.background != "sand" else "sky"
        assert not check_edit(edit, Scene(other, edit.after.objects))


def test_edits_notice_a_moved_neighbor(rng):
    edit = next(
        e for e in iter(lambda: draw_edit(rng, "recolor"), None) if len(e.after.objects) > 1
    )
    kept = next(o for o in edit.after.objects if o in edit.before.objects)
    rest = tuple(o for o in edit.after.objects if o is not kept)
    for shift, right in ((4, True), (5, False)):
        center = (kept.center[0], kept.center[1] + shift)
        moved = SceneObject(kept.shape, kept.color, kept.cell, center, kept.size)
        assert check_edit(edit, Scene(edit.after.background, (*rest, moved))) == right


def test_captions():
    scene = Scene("sand", (obj("blue", "square", 5), obj("orange", "ring", 1)))
    assert caption(scene) == "an orange ring and a blue square on a sand background"
    three = Scene("gray", tuple(obj("green", "cross", cell) for cell in (0, 4, 8)))
    assert caption(three) == "three green crosses"
    mixed = Scene("gray", (*three.objects, obj("red", "star", 2)))
    assert caption(mixed) == "three green crosses and a red star"
    assert same_description("a red star and two blue rings", "two blue rings and a red star")
    assert not same_description("a red star", "a red star on a sky background")
    assert not same_description("a red star and a blue ring", "a blue star and a red ring")


def test_labels():
    assert len(set(labels())) == 48 and "an orange star" in labels() and "a red ring" in labels()


def answer_by_hand(scene: Scene, question: str) -> str | None:
    """Answer the simple kinds from the words of the question alone."""
    words = split_words(question)
    if question.startswith("is there"):
        return "yes" if (words[3], words[4]) in {o.look for o in scene.objects} else "no"
    if question.startswith("how many"):
        shape = {"crosses": "cross"}.get(words[2], words[2].removesuffix("s"))
        count = sum(o.shape == shape for o in scene.objects)
        return ["zero", "one", "two", "three", "four"][count]
    if words[:2] in (["what", "color"], ["what", "colour"]):
        (color,) = {o.color for o in scene.objects if o.shape == words[4]}
        return color
    if words[:2] == ["what", "shape"]:
        (shape,) = {o.shape for o in scene.objects if o.color == words[3]}
        return shape
    return scene.background if question == "what is the background?" else None


def test_answers_are_true(rng):
    for _ in range(300):
        scene = random_scene(rng)
        for question, answer in questions(scene, rng):
            assert answer_by_hand(scene, question) in (answer, None)
            assert check_answer(question, answer, answer.title() + ".")
            assert not check_answer(question, answer, "")
    scene = Scene("gray", (obj("red", "circle", 3), obj("blue", "square", 5)))
    asked = dict(sample_question(rng, scene, "position") for _ in range(100))
    assert asked["is the circle left of the square?"] == "yes"
    assert asked["is the square right of the circle?"] == "yes"
    assert asked["is the circle above the square?"] == "no"
    assert sample_question(rng, Scene("gray", scene.objects[:1]), "position") is None


@pytest.mark.parametrize("kind", ["exists", "position", "count", "background", "color", "shape"])
def test_answers_are_balanced(kind, rng):
    answers = Counter(sample_asked_scene(rng, kind)[2] for _ in range(1000))
    assert max(answers.values()) < 1.7 * min(answers.values())


def test_relation_lessons_answer_position_questions(rng):
    for _ in range(200):
        scene, question, answer = sample_asked_scene(rng, "position")
        asked, relation = sample_relation(rng, scene)
        first, second = re.fullmatch(r"describe the (\w+) with the (\w+)\.", asked).groups()
        if question.startswith(f"is the {first} ") and question.endswith(f" {second}?"):
            assert (f" {relation} " in question) == (answer == "yes")
    assert sample_relation(rng, random_scene(rng, count=1)) is None


def test_training_never_shows_a_held_out_pair(rng):
    for i in range(1250):
        before, _, after = sample_edit(rng)
        prompted = sample_prompted_scene(rng, TAGS[i % len(TAGS)])[1]
        asked = sample_asked_scene(rng)[0]
        for scene in (before, after, prompted, asked, random_scene(rng)):
            assert not is_held_out(scene.objects)


def test_evaluation_sets_are_fixed_and_mark_unseen_pairs():
    prompts = evaluation_prompts("color_attr", 50, 3)
    assert prompts == evaluation_prompts("color_attr", 50, 3)
    assert prompts != evaluation_prompts("color_attr", 50, 4)
    assert sum(not p.seen for p in prompts) == 10
    assert all(p.seen != is_held_out(p.wanted) for p in prompts)
    edits = evaluation_edits(100, 3)
    assert edits == evaluation_edits(100, 3)
    assert Counter((e.kind, e.seen) for e in edits)["add", False] == 4
    asked = evaluation_questions(70, 3)
    assert Counter(kind for kind, *_ in asked) == dict.fromkeys(QUESTION_KINDS, 10)


def test_vocabulary_is_closed(rng):
    texts = [*labels(), "Generate an image.", "Edit the image.", "a photo of a star"]
    for _ in range(400):
        texts += [sample_prompted_scene(rng, tag)[0] for tag in TAGS]
        prompt = make_prompt(rng, "reasoning")
        _, question, answer = sample_asked_scene(rng)
        texts += [sample_edit(rng)[1], plain_form(prompt), question, answer]
        texts += itertools.chain(*questions(random_scene(rng), rng))
    assert {word for text in texts for word in split_words(text)} <= set(vocabulary())
    assert vocabulary() == sorted(set(vocabulary()))


def test_unknown_kinds_are_refused(rng):
    with pytest.raises(ValueError, match=r"tag must be one of single_object.*got 'triples'"):
        make_prompt(rng, "triples")
    with pytest.raises(ValueError, match=r"kind must be one of recolor.*got 'paint'"):
        draw_edit(rng, "paint")
    with pytest.raises(ValueError, match=r"kind must be one of color.*got 'why'"):
        sample_question(rng, random_scene(rng), "why")
