"""Launch configurations: the shipped file, the fallback, and how `clipflow bench tune` chooses."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import tune
from clipflow.ops import all_ops

OPS = {op.name: op for op in all_ops()}


def test_the_clearly_fastest_candidate_wins():
    candidates = [(1, 4), (2, 4), (1, 8)]
    called = []

    def timer(calls):
        for call in calls.values():
            call()
        return dict(zip(candidates, times, strict=True))

    times = [10.0, 9.0, 7.0]
    assert tune.fastest(candidates, called.append, timer) == (1, 8)
    assert called == candidates
    times = [10.0, 9.9, 9.95]
    assert tune.fastest(candidates, called.append, timer) == (1, 4), "noise is no gain"


def test_candidates_begin_with_the_default_and_fit_the_registers():
    candidates = tune.candidates_of((1, 8), 1152)
    assert candidates[0] == (1, 8)
    assert len(candidates) == len(set(candidates))
    assert all(rows * 2048 <= warps * 32 * tune.MOST_VALUES for rows, warps in candidates)
    assert tune.candidates_of((16, 1), 8)[0] == (16, 1)


def test_written_configurations_join_the_others(tmp_path):
    path = tmp_path / "configs.json"
    tune.write(path, {("adaln_norm", "sm_90", 192): (2, 2)}, "first")
    tune.write(path, {("adaln_norm", "sm_80", 192): (1, 4)}, "second")
    tune.write(path, {("adaln_norm", "sm_90", 192): (4, 4)}, "second")
    whole = json.loads(path.read_text())
    assert whole["note"] == "first; second"
    archs = whole["configs"]["adaln_norm"]
    assert archs["sm_90"] == {"192": {"rows": 4, "warps": 4}}
    assert archs["sm_80"] == {"192": {"rows": 1, "warps": 4}}


@pytest.mark.parametrize("name", tune.ROW_OPS)
def test_working_points_have_the_width(name):
    case = tune.case_of(OPS[name], 24)
    inputs = case.inputs(torch.device("cpu"), torch.bfloat16)
    assert inputs[0].shape[-1] == 24
    assert inputs[0].numel() == tune.TOKENS * 24


def test_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_shipped_configurations():
    pytest.importorskip("triton", reason="the package triton is not installed")
    from clipflow.kernels.triton import _configs

    shipped = _configs.read()
    names = {name for op in tune.ROW_OPS for name in (op, f"{op}_backward")}
    assert {op for op, _, _ in shipped} == names - {"adaln_norm_quant_backward"}
    for arch in ("sm_80", "sm_90", "sm_100"):
        for op in {op for op, _, _ in shipped}:
            assert {D for o, a, D in shipped if (o, a) == (op, arch)} == set(tune.WIDTHS)
    for rows, warps in shipped.values():
        assert rows & (rows - 1) == 0 < rows
        assert warps & (warps - 1) == 0 < warps <= 32
    assert json.loads(_configs.PATH.read_text())["note"]


def test_absent_configurations_are_computed_and_overridden():
    pytest.importorskip("triton", reason="the package triton is not installed")
    from clipflow.kernels.triton import _configs

    key = ("adaln_norm", "cpu", 192)
    assert key not in _configs.TABLE
    assert _configs.tile("adaln_norm", 192, -1) == (2, 256, 2)
    with _configs.override(key, (4, 8)):
        assert _configs.tile("adaln_norm", 192, -1) == (4, 256, 8)
    assert key not in _configs.TABLE
