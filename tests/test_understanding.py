"""Reading on from prompts, with kept keys and values, against the whole text read anew."""

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from clipflow.models.language.reading import Reading
from clipflow.models.language.token_sampling import TokenSampling
from clipflow.pipelines import understanding
from clipflow.pipelines.answers import Answer, AnswerEnd, make_answers
from clipflow.pipelines.understanding import label_log_likelihoods, label_trees

QUESTIONS = ["what?", "what colour is the circle left of the star?", "how many squares are there?"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def features(pipe):
    pictures = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.model.encode_image(pictures)


@torch.no_grad()
def read(pipe, features, questions, room=8, pictures=None):
    texts = [pipe.prompts.question(question) for question in questions]
    ids, mask = pipe.prompts.rows(texts, pipe.device)
    return Reading(pipe.model, ids, mask, features, room=room, pictures=pictures)


@torch.no_grad()
def logits_anew(pipe, features, question, said):
    """Logits [1 + len(said), V] at the end of the prompt and after each said token."""
    ids = torch.tensor([pipe.prompts.ids(pipe.prompts.question(question)) + said])
    logits = pipe.model.logits(ids, torch.ones_like(ids), features[None])
    return logits[0, -len(said) - 1 :].float()


def say(pipe, reading, stop):
    end = AnswerEnd(tokens=frozenset({stop}), max_new_tokens=8)
    answers = [Answer(pipe.tokenizer, end) for _ in reading.lengths]
    for _ in make_answers(reading, answers, TokenSampling(), []):
        pass
    return answers


@torch.no_grad()
@pytest.mark.parametrize("questions", [QUESTIONS, QUESTIONS[:1] * 3], ids=["uneven", "even"])
def test_each_row_reads_on_as_if_alone(pipe, features, questions):
    reading = read(pipe, features, questions)
    said = torch.randint(6, 60, (3, 6), generator=torch.Generator().manual_seed(1))
    logits = [reading.next_logits]
    for step in range(6):
        reading.extend(said[:, step])
        logits.append(reading.next_logits)
    for row, question in enumerate(questions):
        wanted = logits_anew(pipe, features[row], question, said[row].tolist())
        found = torch.stack([step[row] for step in logits])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("asked", [[0, 1, 2, 1], [0, 0, 0, 0]], ids=["uneven", "even"])
def test_what_is_asked_about_one_picture_is_begun_once(pipe, features, asked):
    questions, pictures = [QUESTIONS[i] for i in asked], torch.tensor([1, 0, 1, 0])
    lengths = []
    count = pipe.model.language_model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: lengths.append(tuple(args[0].shape[:2]))
    )
    reading = read(pipe, features[:2], questions, pictures=pictures)
    count.remove()
    (pictures_read, shared), (rows, rest) = lengths
    assert (pictures_read, rows) == (2, 4) and shared > features.shape[1] > 3 * rest
    reading.extend(torch.tensor([7, 8, 9, 10]))
    for row, question in enumerate(questions):
        wanted = logits_anew(pipe, features[pictures[row]], question, [7 + row])
        torch.testing.assert_close(reading.next_logits[row], wanted[-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_more_is_written_where_room_was_left(pipe, features):
    reading = read(pipe, features, QUESTIONS)
    before = [[b.data_ptr() for b in pair] for pair in reading.kept.buffers]
    answers = say(pipe, reading, stop=-1)
    assert [len(answer.tokens) for answer in answers] == [8, 8, 8]
    assert [[b.data_ptr() for b in pair] for pair in reading.kept.buffers] == before
    assert reading.lengths.max() == reading.kept.longest


def test_answers_stop_early(pipe, features):
    first = read(pipe, features, QUESTIONS).next_logits.argmax(-1)
    reading = read(pipe, features[:1], QUESTIONS[:1])
    (answer,) = say(pipe, reading, stop=int(first[0]))
    assert answer.tokens == [] and answer.text == "" and len(reading.lengths) == 1
    assert reading.lengths[0] == reading.kept.longest  # nothing was read on


LABELS = [[7], [7, 8], [7, 8, 9, 4], [7, 8, 10, 4], [11, 4], [7, 8]]


@pytest.mark.parametrize("limit", [512, 4, 1])
def test_label_likelihoods_equal_those_of_the_whole_text(pipe, features, monkeypatch, limit):
    monkeypatch.setattr(understanding, "TREE_TOKENS", limit)
    monkeypatch.setattr(understanding, "LOGITS_AT_ONCE", 1000)
    trees = label_trees(LABELS)
    assert limit == 512 or len(trees) > 1
    reading = read(pipe, features, QUESTIONS[:1] * 3)
    found = label_log_likelihoods(reading, trees)
    assert found.shape == (3, len(LABELS)) and found.dtype == torch.float64
    for row in range(3):
        for column, label in enumerate(LABELS):
            chances = logits_anew(pipe, features[row], QUESTIONS[0], label[:-1]).double()
            picked = chances.log_softmax(-1).gather(-1, torch.tensor(label)[:, None])
            assert found[row, column].item() == pytest.approx(picked.sum().item(), abs=1e-5)


def test_common_beginnings_are_read_once():
    (tree,) = label_trees(LABELS)
    assert tree.tokens == [7, 8, 9, 10, 11] and tree.parents == [0, 1, 2, 2, 0]
    assert tree.ancestry() == ([0, 1, 2, 2, 0], [[0], [0, 1], [0, 1, 2], [0, 1, 3], [4]])
    assert tree.paths[1] == tree.paths[5] and len(tree.edges) == 8


def test_a_tree_is_not_kept(pipe, features):
    reading = read(pipe, features, QUESTIONS[:1] * 3)
    before = reading.next_logits
    label_log_likelihoods(reading, label_trees(LABELS))
    assert torch.equal(reading.next_logits, before)
    reading.extend(torch.tensor([7, 7, 7]))
    wanted = logits_anew(pipe, features[0], QUESTIONS[0], [7])[-1]
    torch.testing.assert_close(reading.next_logits[0], wanted, atol=1e-5, rtol=1e-5)


def test_a_tree_after_rows_of_several_lengths(pipe, features):
    reading = read(pipe, features, QUESTIONS)
    assert not reading.kept.even
    found = label_log_likelihoods(reading, label_trees(LABELS))
    for row, question in enumerate(QUESTIONS):
        alone = read(pipe, features[row : row + 1], [question])
        wanted = label_log_likelihoods(alone, label_trees(LABELS))[0]
        torch.testing.assert_close(found[row], wanted, atol=1e-5, rtol=1e-5)
