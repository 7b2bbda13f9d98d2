"""A run that was killed, damaged or stopped ends bitwise like one that was not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from training_toy import ToyModel, ToyStage, toy_recipe

from clipflow.training import checkpoint
from clipflow.training.loop import fit


def run(out: Path, *, before_step=lambda step: None, **changes) -> dict[str, torch.Tensor]:
    """The weights a toy run ends with, in `out`."""
    model = ToyModel()
    fit(model, ToyStage(before_step), toy_recipe(**changes), out, progress=False)
    return model.state_dict()


def assert_same_bits(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A finished run and its weights; tests copy the folder and break the copy."""
    out = tmp_path_factory.mktemp("unbroken")
    return out, run(out)


@pytest.fixture
def finished(unbroken, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    out, expected = unbroken
    return shutil.copytree(out, tmp_path / "run"), expected


def steps_logged(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("moment", ["in a step", "in a checkpoint"])
def test_killed_run_resumes_bitwise(moment, finished, tmp_path, caplog):
    straight, expected = finished
    script = Path(__file__).with_name("training_toy.py")
    killed = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed"), moment],
        env={**os.environ, "PYTHONPATH": str(script.parent.parent)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    names = sorted(p.name.split("-")[1] for p in (tmp_path / "killed/checkpoints").iterdir())
    half = ["000015.tmp"] if moment == "in a checkpoint" else []
    assert names == ["000005", "000010", *half]

    seen = []
    resumed = run(tmp_path / "killed", before_step=seen.append)
    assert seen == list(range(10, 20))
    assert ("half-written" in caplog.text) == bool(half)
    assert_same_bits(resumed, expected)
    assert steps_logged(tmp_path / "killed") == steps_logged(straight)
    kept = sorted(p.name for p in (tmp_path / "killed/checkpoints").iterdir())
    assert kept == ["step-000015", "step-000020"]


def flip_a_byte(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def lose_a_file(folder: Path) -> None:
    (folder / "rng.safetensors").unlink()


def spoil_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "step"')


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, lose_a_file, spoil_the_manifest])
def test_damaged_checkpoint_is_passed_over(damage, finished, caplog):
    out, expected = finished
    damage(out / "checkpoints/step-000020")
    seen = []
    assert_same_bits(run(out, before_step=seen.append), expected)
    assert seen == [15, 16, 17, 18, 19]
    assert "step-000020 is damaged" in caplog.text
    assert checkpoint.load(out / "checkpoints").step == 20


def test_finished_run_only_restores(finished):
    out, expected = finished
    seen = []
    assert_same_bits(run(out, before_step=seen.append), expected)
    assert seen == []


def test_with_prefetch_the_same(finished, tmp_path):
    _, expected = finished
    assert_same_bits(run(tmp_path / "ahead", options={"prefetch": True}), expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stop_signal_saves_and_continues(optimizer, tmp_path):
    def stop_at_7(step: int) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    changes = {"optimizer": optimizer, "checkpoint_every": 100}
    with pytest.raises(KeyboardInterrupt, match="stopped at step 8"):
        run(tmp_path / "stopped", before_step=stop_at_7, **changes)
    seen = []
    resumed = run(tmp_path / "stopped", before_step=seen.append, **changes)
    assert seen[0] == 8
    assert_same_bits(resumed, run(tmp_path / "straight", **changes))


def test_checkpoint_of_another_model_is_refused(finished):
    out, _ = finished

    class Wider(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="must hold the tensors of this model, got 2 missing"):
        fit(Wider(), ToyStage(), toy_recipe(), out, progress=False)


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    snapshot = checkpoint.Snapshot(1, 0.0, {"model": {"w": torch.zeros(100_000)}})
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"cannot write .*step-000001: disk full: 0 MB needed"):
        checkpoint.save(tmp_path, snapshot)
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_while_writing(tmp_path):
    """The limit on file sizes stands in for a full disk: the write itself fails."""
    checkpoint.save(tmp_path, checkpoint.Snapshot(1, 0.0, {"model": {"w": torch.zeros(10)}}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        snapshot = checkpoint.Snapshot(2, 0.0, {"model": {"w": torch.zeros(100_000)}})
        with pytest.raises(OSError, match=r"cannot write .*step-000002"):
            checkpoint.save(tmp_path, snapshot)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.load(tmp_path).step == 1
