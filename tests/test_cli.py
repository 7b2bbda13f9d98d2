"""The command line in this process: what commands write and print, and how they refuse."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_image_io import write_bad_files
from tiny_pipeline import tiny_pipeline

from clipflow import FirstBlockCache, TaylorForecast
from clipflow.cli import main
from clipflow.cli.pictures import draw_grid
from clipflow.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, beside nothing else."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).save(path)
    return str(path)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def generate(model, *arguments):
    return main(["generate", *arguments, "--model", model, "--steps", "2", "--device", "cpu"])


def test_generate_one_file(model, place, capsys):
    assert generate(model, "a red star", "-o", "out.png", "--seed", "3") == 0
    assert capsys.readouterr().out == "out.png  seed 3  a red star\n"
    assert Image.open("out.png").size == (56, 56) and names(place) == ["out.png"]
    first = (place / "out.png").read_bytes()
    assert generate(model, "a red star", "-o", "out.png", "--seed", "3") == 0
    assert (place / "out.png").read_bytes() == first


def test_generate_a_folder_with_a_grid(model, place, capsys):
    prompts = ["a red star", "two blue rings"]
    options = ["--num-images", "2", "--grid", "--seed", "0", "--batch-size", "3"]
    assert generate(model, *prompts, "-o", "pictures", *options) == 0
    assert names(place / "pictures") == [
        "000-a-red-star.png", "001-a-red-star.png",
        "002-two-blue-rings.png", "003-two-blue-rings.png", "grid.png",
    ]  # fmt: skip
    assert "seed 3  two blue rings" in capsys.readouterr().out
    # The fourth picture has the fourth seed, whatever was drawn along with it.
    assert generate(model, prompts[1], "-o", "alone.png", "--seed", "3") == 0
    together = Image.open("pictures/003-two-blue-rings.png").tobytes()
    alone = Image.open("alone.png").tobytes()
    assert max(abs(a - b) for a, b in zip(together, alone, strict=True)) <= 1


def test_generate_only_a_grid(model, place):
    assert generate(model, "a star", "a ring", "-o", "grid.jpg", "--grid") == 0
    assert names(place) == ["grid.jpg"]


def test_generate_notes_unknown_words_and_prints_its_seed(model, place, capsys):
    assert generate(model, "a zeppelin", "-o", "out.png", "--guidance", "1") == 0
    captured = capsys.readouterr()
    assert captured.err == "clipflow: note: the model does not know 'zeppelin'\n"
    seed = captured.out.split("seed ")[1].split()[0]
    first = (place / "out.png").read_bytes()
    generate(model, "a zeppelin", "-o", "out.png", "--guidance", "1", "--seed", seed)
    assert (place / "out.png").read_bytes() == first


def test_edit(model, place, picture, capsys):
    options = ["--model", model, "--steps", "2", "--seed", "1"]
    assert main(["edit", picture, "remove the square", "-o", "out.png", *options]) == 0
    assert names(place) == ["out.png"] and "seeds from 1" in capsys.readouterr().out


def test_ask_prints_the_answer_streamed_or_not(model, place, picture, capsys):
    command = ["ask", picture, "what is the background?", "--model", model]
    command += ["--max-new-tokens", "4"]
    assert main(command) == 0
    answer = capsys.readouterr().out
    assert answer.endswith("\n")
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out == answer


def test_classify_as_text_and_as_json(model, place, picture, capsys):
    command = ["classify", picture, "--labels", "a red star, a ring", "--model", model]
    assert main([*command, "--json"]) == 0
    ranking = json.loads(capsys.readouterr().out)
    assert {label for label, _ in ranking} == {"a red star", "a ring"}
    assert sum(chance for _, chance in ranking) == pytest.approx(1)
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f"  {ranking[0][0]}")


def test_reconstruct_prints_how_alike_the_pictures_are(model, place, picture, capsys):
    assert main(["reconstruct", picture, "-o", "again.png", "--model", model]) == 0
    out = capsys.readouterr().out
    assert out.startswith("again.png  PSNR ") and " dB  SSIM " in out


def test_demo_shows_everything(model, place, capsys):
    assert main(["demo", "-o", "shown", "--steps", "1", "--model", model]) == 0
    out = capsys.readouterr().out
    for call in ("pipe(", "pipe.edit(", "pipe.ask(", "pipe.classify(", "pipe.reconstruct("):
        assert call in out
    assert "grid.png" in names(place / "shown") and "00.png" in names(place / "shown")


def test_eval_prints_a_table_and_writes_json(model, place, capsys):
    options = ["--prompts-per-tag", "1", "--steps", "1", "--json", "scores.json"]
    assert main(["eval", "scenes", *options, "--model", model]) == 0
    assert "color_attr" in capsys.readouterr().out
    scores = json.loads((place / "scores.json").read_text())
    assert scores["generation"]["position"]["count"] == 1
    assert scores["settings"]["steps"] == 1
    assert scores["settings"]["guidance_scale"] == 2.0  # what tiny_pipeline has by default


def test_eval_fidelity(model, place, capsys):
    options = ["--prompts-per-tag", "1", "--steps", "6", "--step-cache", "taylor:2"]
    assert main(["eval", "fidelity", *options, "--json", "near.json", "--model", model]) == 0
    assert "psnr" in capsys.readouterr().out
    found = json.loads((place / "near.json").read_text())
    assert found["skipped_steps"] == 1 and found["psnr"] > 20


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("first-block", FirstBlockCache()),
        ("first-block:0.25", FirstBlockCache(threshold=0.25)),
        ("taylor", TaylorForecast()),
        ("taylor:4", TaylorForecast(interval=4)),
    ],
)
@pytest.mark.parametrize("command", ["generate", "edit", "eval"])
def test_tier_and_step_cache_reach_the_pipeline(
    command, text, cache, model, place, picture, monkeypatch
):
    calls = []

    def call(pipe, *_, tier, step_cache, **others):
        calls.append((tier, step_cache))
        raise InputError("enough")

    monkeypatch.setattr("clipflow.pipelines.CLIPFlowPipeline.__call__", call)
    monkeypatch.setattr("clipflow.pipelines.CLIPFlowPipeline.edit", call)
    arguments = {
        "generate": ["a star", "-o", "out.png"],
        "edit": [picture, "remove the star", "-o", "out.png"],
        "eval": ["scenes"],
    }[command]
    options = ["--tier", "fast", "--step-cache", text, "--model", model]
    assert main([command, *arguments, *options]) == 2
    assert calls == [("fast", cache)]


def test_train_hands_its_options_on(place, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("clipflow.training.run.train", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr("clipflow.training.run.train_scenes", lambda *a, **k: calls.append((a, k)))
    assert main(["train", "understanding", "--out", "runs", "--minutes", "5", "--quiet"]) == 0
    assert main(["train", "scenes", "--out", "runs", "--scale", "0.5"]) == 0
    first, second = calls
    assert first[0] == ("understanding", Path("runs"))
    assert first[1] == {"steps": None, "minutes": 5.0, "progress": False}
    assert second == ((Path("runs"),), {"chain": "scenes", "scale": 0.5, "progress": True})


def test_train_refuses_a_broken_recipe_file(place, tmp_path, capsys):
    recipe = tmp_path / "broken.yaml"
    for text in ("[", "steps: many"):
        recipe.write_text(text)
        refused(["train", str(recipe), "--out", "runs"], place, capsys, "recipe")


def test_info(model, place, capsys):
    assert main(["info", model]) == 0
    assert "InternViT" in capsys.readouterr().out
    assert main(["info", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    pipe = tiny_pipeline()
    memory = facts["memory"]["fast"]["float32"]
    assert memory["cpu"] == pipe.memory_estimate(tier="fast").peak
    assert facts["weight_bytes"]["float32"] < memory["cuda"]
    assert memory["cuda_offload"] < memory["cuda"] <= memory["cpu"]
    assert facts["total"] == sum(weight.numel() for weight in pipe.model.parameters())
    assert facts["weight_bytes"]["float32"] == 4 * facts["total"]
    pipe.to(torch.bfloat16)
    held = sum(weight.nbytes for weight in pipe.model.parameters())
    assert facts["weight_bytes"]["bfloat16"] == held


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "adaln_norm on cpu: " in out and torch.__version__ in out
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (row,) = [r for r in facts["ops"] if (r["op"], r["device"]) == ("adaln_norm", "cpu")]
    assert row["uses"] in row["refusals"] and row["refusals"][row["uses"]] is None


@pytest.mark.parametrize("command", [[], ["generate"], ["edit"], ["bench"], ["train"], ["demo"]])
def test_help_has_an_example(command, capsys):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: clipflow" in out and "  clipflow " in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("clipflow ")


def test_bench_says_where_benchmarks_are(place, monkeypatch, capsys):
    monkeypatch.setattr("clipflow.cli.bench.__file__", str(place / "a" / "b" / "c" / "bench.py"))
    assert main(["bench", "ops"]) == 2
    assert "in the clipflow repository" in capsys.readouterr().err
    (place / "benchmarks").mkdir()
    (place / "benchmarks" / "ops.py").write_text("def main(argv):\n    print('ran', argv)\n")
    assert main(["bench", "ops", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "ran ['--device', 'cpu']\n"


GENERATE = ["generate", "a star", "-o", "out.png"]
BAD_COMMANDS = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["draw"], "draw"),
    "no output": (["generate", "a star"], "required: -o"),
    "empty prompt": (["generate", "", "-o", "out.png"], "prompt: must not be empty"),
    "blank prompt": (["generate", " ", "-o", "out.png"], "prompt: must not be empty"),
    "reserved marker": (["generate", "a <img>", "-o", "out.png", "MODEL"], "marker"),
    "steps 0": ([*GENERATE, "--steps", "0"], "from 1 to 1000, got '0'"),
    "steps no number": ([*GENERATE, "--steps", "many"], "got 'many'"),
    "negative guidance": ([*GENERATE, "--guidance", "-1"], "at least 0, got '-1'"),
    "guidance nan": ([*GENERATE, "--guidance", "nan"], "got 'nan'"),
    "unknown tier": ([*GENERATE, "--tier", "quick"], "quick"),
    "unknown cache": ([*GENERATE, "--step-cache", "lru"], "first-block[:THRESHOLD] or taylor"),
    "threshold 0": ([*GENERATE, "--step-cache", "first-block:0"], "a number above 0, got '0'"),
    "interval 1": ([*GENERATE, "--step-cache", "taylor:1"], "from 2 to 1000, got '1'"),
    "no interval": ([*GENERATE, "--step-cache", "taylor:"], "from 2 to 1000, got ''"),
    "no pictures": ([*GENERATE, "--num-images", "0"], "--num-images"),
    "negative seed": ([*GENERATE, "--seed", "-1"], "--seed"),
    "unknown solver": ([*GENERATE, "--solver", "ddim"], "ddim"),
    "unknown dtype": ([*GENERATE, "--dtype", "int8"], "int8"),
    "unknown device": ([*GENERATE, "--device", "abacus"], "got 'abacus'"),
    "missing gpu": ([*GENERATE, "--device", "cuda:77"], "GPUs here"),
    "offload on the CPU": ([*GENERATE, "--device", "cpu", "--offload", "always"], "other than"),
    "unknown model": ([*GENERATE, "--model", "no-such"], "'no-such' is unknown"),
    "model is a file": ([*GENERATE, "--model", "PICTURE"], "got a file"),
    "unknown suffix": (["generate", "a star", "-o", "out.xyz"], "must end in .png"),
    "no folder": (["generate", "a star", "-o", "no/out.png"], "no folder no"),
    "no folder for a folder": (["generate", "a star", "-o", "no/where/"], "must be a folder"),
    "many pictures, one file": (["generate", "a", "b", "-o", "out.png"], "2 pictures"),
    "output is a file's child": (["generate", "a", "-o", "PICTURE/a.png"], "cannot be written"),
    "empty instruction": (["edit", "PICTURE", "", "-o", "out.png"], "must not be empty"),
    "empty question": (["ask", "PICTURE", ""], "must not be empty"),
    "no labels": (["classify", "PICTURE", "--labels", ","], "labels between commas"),
    "demo into a file": (["demo", "-o", "PICTURE"], "must be a folder"),
    "unknown info": (["info", "nothing"], "'nothing' is unknown"),
    "unknown benchmark": (["bench", "luck"], "luck"),
    "unknown suite": (["eval", "moon"], "moon"),
    "unknown recipe": (["train", "no-such-recipe", "--out", "runs"], "no-such-recipe"),
    "train scenes with steps": (["train", "scenes", "--out", "runs", "--steps", "1"], "--scale"),
    "eval into no folder": (["eval", "scenes", "--json", "no/scores.json"], "no folder no"),
}  # fmt: skip


def refused(arguments, place, capsys, message):
    """One line on stderr, nothing on stdout, exit code 2, nothing written."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("clipflow: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    assert names(place) == []


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_are_refused_in_one_line(case, model, place, picture, capsys):
    arguments, message = BAD_COMMANDS[case]
    arguments = [a.replace("PICTURE", picture) for a in arguments]
    if "MODEL" in arguments:
        arguments[-1:] = ["--model", model]
    refused(arguments, place, capsys, message)


def test_bad_pictures_are_refused_in_one_line(place, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, message in write_bad_files(bad).items():
        image = str(bad / name)
        refused(["edit", image, "remove the star", "-o", "out.png"], place, capsys, message)
        refused(["ask", image, "what?"], place, capsys, message)
        refused(["classify", image, "--labels", "a"], place, capsys, message)
        refused(["reconstruct", image, "-o", "out.png"], place, capsys, message)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_refused(place, capsys):
    place.chmod(0o555)
    refused(GENERATE, place, capsys, "read-only")


def test_a_full_disk_leaves_nothing_half_written(model, place, monkeypatch, capsys):
    def full(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert generate(model, "a star", "-o", "out.png") == 2
    assert "No space left on device" in capsys.readouterr().err and names(place) == []


def test_our_own_bugs_keep_their_traceback(model, place, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("clipflow.pipelines.CLIPFlowPipeline.__call__", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        generate(model, "a star", "-o", "out.png")


def test_grid_wraps_long_captions_and_keeps_small_pictures_sharp():
    tiny = Image.new("RGB", (2, 2), (0, 0, 0))
    tiny.putpixel((0, 0), (255, 0, 0))
    sheet = draw_grid([tiny, Image.new("RGB", (300, 100))], ["a b " * 60, "x"])
    assert sheet.getpixel((10, 10)) == (255, 0, 0) and sheet.width > 256
