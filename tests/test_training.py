"""Recipes, schedule, EMA, parameter selection, and the chain of runs."""

from __future__ import annotations

import itertools
import json
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_toy import ToyModel, ToyStage, toy_recipe

from clipflow.training import checkpoint, loop, muon, optim, run, schedule
from clipflow.training.ema import EMA, ramped_decay
from clipflow.training.loop import fit
from clipflow.training.recipe import Recipe, find_recipe
from clipflow.training.report import Report

YAML = """
name: toy
stage: toy
steps: 6
batch_size: 8
lr: 1e-2
betas: [0.9, 0.95]
trainable: [body]
lr_scale: {body.0: 0.5}
checkpoint_every: 2.5 minutes
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(YAML)
    return path


def test_recipe_reads_yaml(recipe_file):
    recipe = Recipe.load(recipe_file)
    assert (recipe.lr, recipe.betas, recipe.trainable) == (0.01, (0.9, 0.95), ("body",))
    assert (recipe.checkpoint_steps, recipe.checkpoint_minutes) == (None, 2.5)
    assert (recipe.min_lr_ratio, recipe.warmup_steps, recipe.ema) == (0.05, 100, 0.999)


def test_unknown_key_names_it_and_the_known_ones(recipe_file):
    recipe_file.write_text(YAML + "learning_rate: 3\n")
    with pytest.raises(ValueError, match=r"unknown key 'learning_rate'; known: name, stage, .*lr"):
        Recipe.load(recipe_file)


def test_missing_key_is_named():
    with pytest.raises(ValueError, match="missing key 'steps', 'lr'"):
        Recipe.from_mapping({"name": "a", "stage": "toy", "batch_size": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("lr", "fast"),
        ("lr", 0),
        ("lr", math.nan),
        ("minutes", -1),
        ("ema", 1.0),
        ("optimizer", "sgd"),
        ("checkpoint_every", "5 hours"),
        ("checkpoint_every", 0),
        ("checkpoint_every", "1.2.3 minutes"),
        ("trainable", "body"),
        ("lr_scale", {"body": "x"}),
        ("betas", [0.9]),
        ("name", "../elsewhere"),
        ("stage", "os.path"),
        ("options", None),
        ("compile", "yes"),
    ],
)
def test_bad_value_is_named(key, value):
    with pytest.raises(ValueError, match=f"recipe: {key} must be .*, got"):
        toy_recipe(**{key: value})


def test_recipe_that_is_no_mapping(recipe_file):
    recipe_file.write_text("just words")
    with pytest.raises(ValueError, match="must be a mapping, got str"):
        Recipe.load(recipe_file)
    recipe_file.write_text("a: [1")
    with pytest.raises(ValueError, match="must be YAML"):
        Recipe.load(recipe_file)


def test_unknown_recipe_name():
    with pytest.raises(FileNotFoundError, match=r"must be one of .*, got 'no-such-recipe'"):
        find_recipe("no-such-recipe")


def test_schedule_values():
    def ratio(step, done):
        return schedule.lr_ratio(step, done, warmup_steps=10, min_lr_ratio=0.1)

    assert ratio(0, 0.0) == pytest.approx(0.1)
    assert ratio(4, 0.0) == pytest.approx(0.5)
    assert ratio(50, 0.5) == pytest.approx(0.55)
    assert ratio(100, 1.0) == pytest.approx(0.1)
    assert schedule.lr_ratio(0, 0.0, warmup_steps=0, min_lr_ratio=0.1) == 1.0


def test_progress_follows_the_faster_of_steps_and_clock():
    assert schedule.progress(30, 100, 1e9, None) == 0.3
    assert schedule.progress(30, 100, 60.0, 2.0) == 0.5
    assert schedule.progress(30, 100, 12.0, 2.0) == 0.3
    assert schedule.progress(30, 100, 500.0, 2.0) == 1.0


def test_ema_follows_its_definition():
    weight = nn.Parameter(torch.zeros(2))
    ema = EMA({"w": weight}, decay=0.9)
    expected = 0.0
    for n in range(200):
        weight.data.fill_(n + 1.0)
        ema.update(n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1.0)
    assert ramped_decay(0.9, 0) == 0.1
    torch.testing.assert_close(ema.averages["w"], torch.full((2,), expected))
    ema.copy_to_parameters()
    assert torch.equal(weight.data, ema.averages["w"])


def test_ema_of_zero_is_the_last_weights():
    weight = nn.Parameter(torch.zeros(2))
    ema = EMA({"w": weight}, decay=0.0)
    weight.data.fill_(0.3)
    ema.update(0)
    assert torch.equal(ema.averages["w"], weight.data)


def test_trainable_prefixes_are_dotted():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
    assert list(optim.select_trainable(model, ("a",))) == ["a.weight", "a.bias"]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    assert len(optim.select_trainable(model, ())) == 4
    with pytest.raises(ValueError, match=r"trainable must name .*\(under a, ab\), got 'b'"):
        optim.select_trainable(model, ("b",))


def test_groups_carry_scale_and_decay():
    model = ToyModel()
    recipe = toy_recipe(lr_scale={"body": 0.5, "body.0": 0.25}, weight_decay=0.1)
    optimizers = optim.build_optimizers(model, optim.select_trainable(model, ()), recipe)
    optim.set_lr(optimizers, 0.4)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizers[0].param_groups
        for name in group["names"]
    }
    assert found["body.0.weight"] == (0.1, 0.1)
    assert found["body.0.bias"] == (0.1, 0.0)
    assert found["body.1.weight"] == (0.2, 0.0)
    assert found["head.weight"] == (0.4, 0.1)
    with pytest.raises(ValueError, match="lr_scale must name"):
        optim.build_optimizers(model, {}, toy_recipe(lr_scale={"tail": 1.0}))


def test_muon_takes_hidden_matrices_only():
    model = nn.ModuleDict(
        {"table": nn.Embedding(4, 4), "mix": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)}
    )
    recipe = toy_recipe(optimizer="muon", lr_scale={})
    trained = optim.select_trainable(model, ())
    _, muon = optim.build_optimizers(model, trained, recipe)
    assert [name for group in muon.param_groups for name in group["names"]] == ["mix.weight"]


def test_frozen_parameters_stay(tmp_path):
    model, untouched = ToyModel(), ToyModel()
    recipe = toy_recipe(trainable=["head"], log_every=5)
    fit(model, ToyStage(), recipe, tmp_path, progress=False)
    assert torch.equal(model.tied.weight, untouched.tied.weight)
    assert not torch.equal(model.head.weight, untouched.head.weight)
    assert not model.training


def test_log_has_a_line_every_few_steps(tmp_path):
    fit(ToyModel(), ToyStage(), toy_recipe(log_every=10), tmp_path, progress=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    metrics = ("noise", "grad_norm")
    assert lines[0].keys() == {"step", "loss", "lr", "images_per_second", "minutes", *metrics}
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["lr"] < lines[0]["lr"]


def test_clock_ends_a_run_at_the_floor_of_the_schedule(tmp_path, monkeypatch):
    ticks = itertools.count(step=0.001)  # a clock of its own: a millisecond a look
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    recipe = toy_recipe(steps=10**9, minutes=0.01, log_every=1, warmup_steps=0)
    fit(ToyModel(), ToyStage(), recipe, tmp_path, progress=False)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert 0.01 <= last["minutes"] < 0.05
    assert last["lr"] == pytest.approx(0.05 * recipe.lr, rel=0.3)
    assert checkpoint.load(tmp_path / "checkpoints").step == last["step"]


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Broken(ToyStage):
        def loss(self, batch, step):
            loss, metrics = super().loss(batch, step)
            return loss * (math.nan if step == 7 else 1.0), metrics

    with pytest.raises(ValueError, match="loss must be finite, got nan in steps 6 to 8"):
        fit(ToyModel(), Broken(), toy_recipe(), tmp_path, progress=False)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


def test_gradient_that_is_not_finite_is_never_saved(tmp_path):
    class Exploding(ToyStage):
        def loss(self, batch, step):
            if step == 9:  # the loss stays finite
                self.model.head.weight.register_hook(lambda grad: grad * math.inf)
            return super().loss(batch, step)

    with pytest.raises(ValueError, match=r"grad_norm must be finite, got .* in steps 9 to 10"):
        fit(ToyModel(), Exploding(), toy_recipe(), tmp_path, progress=False)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


@pytest.fixture
def toy_stages(monkeypatch):
    """`clipflow.training.stages.toy`, and counts of the steps it trained."""
    steps = []
    module = types.ModuleType("clipflow.training.stages.toy")
    module.STAGE = lambda: ToyStage(steps.append)
    module.__spec__ = types.SimpleNamespace(name=module.__name__)
    package = types.ModuleType("clipflow.training.stages")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return steps


def test_train_saves_the_average_and_returns_when_done(recipe_file, tmp_path, toy_stages):
    model = ToyModel()
    final = run.train(recipe_file, tmp_path / "out", model=model, steps=4, progress=False)
    assert final == tmp_path / "out/toy/final"
    saved = load_file(final / "model.safetensors")
    assert torch.equal(saved["head.weight"], model.head.weight)
    run.train(recipe_file, tmp_path / "out", model=ToyModel(), steps=4, progress=False)
    assert toy_stages == [0, 1, 2, 3]
    run.train(recipe_file, tmp_path / "out", model=ToyModel(), steps=6, progress=False)
    assert toy_stages == [0, 1, 2, 3, 4, 5]


def test_train_refuses_the_folder_of_another_run(recipe_file, tmp_path, toy_stages):
    run.train(recipe_file, tmp_path / "out", model=ToyModel(), progress=False)
    recipe_file.write_text(YAML.replace("1e-2", "2e-2"))
    with pytest.raises(ValueError, match="holds a run that differs in lr; remove it"):
        run.train(recipe_file, tmp_path / "out", model=ToyModel(), progress=False)


def test_train_may_move_to_other_threads(recipe_file, tmp_path, toy_stages):
    run.train(recipe_file, tmp_path / "out", model=ToyModel(), progress=False)
    recipe_file.write_text(YAML + "options: {prefetch: false}\nlog_every: 7\n")
    run.train(recipe_file, tmp_path / "out", model=ToyModel(), progress=False)
    assert toy_stages == [0, 1, 2, 3, 4, 5]


def test_train_needs_the_result_it_starts_from(recipe_file, tmp_path, toy_stages):
    recipe_file.write_text(YAML + "init: earlier\n")
    with pytest.raises(FileNotFoundError, match=r"starts from 'earlier'.* train 'earlier' first"):
        run.train(recipe_file, tmp_path / "out", progress=False)


def test_unknown_stage_is_named(tmp_path):
    with pytest.raises(ValueError, match="no stage 'nonsense'"):
        run.stage_of(toy_recipe(stage="nonsense"))


@pytest.mark.parametrize("chain", run.CHAINS)
def test_train_scenes_chains_the_recipes(chain, tmp_path, toy_stages, monkeypatch):
    names = run.CHAINS[chain]
    folder = tmp_path / "recipes"
    folder.mkdir()
    earlier = "null"
    for name in names:
        text = YAML.replace("name: toy", f"name: {name}") + f"init: {earlier}\n"
        (folder / f"{name}.yaml").write_text(text)
        earlier = name
    sources = []

    def initial_model(recipe, source):
        sources.append(source and source.parent.name)
        return ToyModel()

    monkeypatch.setattr("clipflow.training.recipe.PACKAGED", (folder,))
    monkeypatch.setattr(run, "_initial_model", initial_model)
    final = run.train_scenes(tmp_path / "out", chain=chain, scale=0.5, progress=False)
    assert final == tmp_path / "out" / names[-1] / "final"
    assert sources == [None, *names[:-1]]
    assert toy_stages == [0, 1, 2] * len(names)
    run.train_scenes(tmp_path / "out", chain=chain, scale=0.5, progress=False)
    assert len(toy_stages) == 3 * len(names)


@pytest.mark.parametrize("chain", run.CHAINS)
def test_packaged_recipes_start_from_the_one_before(chain):
    recipes = [Recipe.load(find_recipe(name)) for name in run.CHAINS[chain]]
    assert [recipe.init for recipe in recipes] == [None, *(r.name for r in recipes[:-1])]


def test_a_metric_of_some_steps_is_a_mean_over_those(tmp_path):
    with Report(tmp_path, "toy", step=0, steps=4, log_every=4, bar=False) as report:
        for step in range(4):
            metrics = {"edit": 3.0} if step == 1 else {}
            report.add(torch.tensor(float(step)), metrics, 1)
        report.flush(4, lr=0.1, elapsed=1.0, done=1.0, force=False)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert (line["loss"], line["edit"]) == (1.5, 3.0)


def test_muon_orthogonalizes_its_update():
    tall = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    for matrix in (tall, tall.T):
        values = torch.linalg.svdvals(muon.orthogonalize(matrix))
        assert values.min() > 0.6
        assert values.max() < 1.3
