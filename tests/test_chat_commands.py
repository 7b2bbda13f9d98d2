"""The commands that answer: `clipflow ask` and `clipflow chat`."""

import io

import pytest
from PIL import Image
from tiny_chat import noise_picture as picture
from tiny_chat import said, user
from tiny_pipeline import tiny_pipeline

from clipflow.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images(tmp_path):
    paths = [str(tmp_path / f"{index}.png") for index in range(2)]
    for index, path in enumerate(paths):
        picture(index).save(path)
    return paths


def printed(capsys, *command):
    assert main([*command, "--max-new-tokens", "6"]) == 0
    return capsys.readouterr().out


def test_ask_several_pictures_and_tiles(model, images, capsys):
    scenes = tiny_pipeline()
    question = "what is the background?"
    for paths in (images[:1], images):
        for tiles in (1, 3):
            wanted = scenes.chat([user(*paths_to_images(paths), question)], max_new_tokens=6,
                                 max_tiles=tiles)  # fmt: skip
            options = ["--model", model, "--tiles", str(tiles)]
            assert printed(capsys, "ask", *paths, question, *options) == wanted + "\n"
    alone = scenes.ask(images[0], question, max_new_tokens=6)
    assert printed(capsys, "ask", images[0], question, "--model", model) == alone + "\n"


def paths_to_images(paths):
    return [Image.open(path) for path in paths]


def test_ask_draws_by_a_seed(model, images, capsys):
    command = ["ask", images[0], "what colour is the star?", "--model", model]
    command += ["--temperature", "3", "--top-p", "0.99", "--top-k", "60"]
    answers = [printed(capsys, *command, "--seed", str(seed)) for seed in range(3)]
    assert len(set(answers)) > 1
    assert printed(capsys, *command, "--seed", "1", "--stream") == answers[1]
    first = answers[1].split()[1]
    cut = printed(capsys, *command, "--seed", "1", "--stop", first)
    assert answers[1].startswith(cut.strip()) and first not in cut


def test_chat_reads_lines_and_remembers(model, images, capsys, monkeypatch):
    scenes = tiny_pipeline()
    history, wanted = [], ""
    lines = ["what is the background?", "how many stars are there?"]
    for index, line in enumerate(lines):
        history.append(user(*(paths_to_images(images) if index == 0 else ()), line))
        answer = scenes.chat(history, max_new_tokens=6)
        history.append(said("assistant", answer))
        wanted += answer + "\n"
    assert all(message["content"] for message in history)
    for ending in ("", "\n/exit\nis there a star?\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"\n{lines[0]}\n\n{lines[1]}" + ending))
        assert printed(capsys, "chat", *images, "--model", model) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tiles", "0"], "argument --tiles"),
        (["--temperature", "-1"], "argument --temperature"),
        (["--top-p", "0"], "a number above 0 and at most 1, got '0'"),
        (["--top-k", "-1"], "argument --top-k"),
        (["--stop", ""], "argument --stop: must not be empty"),
        (["--max-new-tokens", "5000"], "tokens in all"),
    ],
)
def test_commands_refuse_in_one_line(model, images, options, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n"))
    for command in (["ask", images[0], "what?"], ["chat", images[0]]):
        assert main([*command, "--model", model, *options]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("clipflow: error: ") and message in captured.err
        assert captured.err.count("\n") == 1 and not captured.out


def test_a_marker_is_refused_in_one_line(model, images, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("an <img>\n"))
    for command, name in ((["ask", images[0], "an <img>"], "question"), (["chat"], "message")):
        assert main([*command, "--model", model]) == 2
        wanted = f"clipflow: error: {name} must not contain the marker '<img>'\n"
        assert capsys.readouterr().err == wanted


def test_chat_on_a_terminal_goes_on_after_an_error(model, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal("an <img>\nwhat?\n/exit\n"))
    assert main(["chat", "--model", model, "--max-new-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert "the marker '<img>'" in captured.err and captured.out.count("> ") == 3
