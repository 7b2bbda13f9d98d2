"""The restated first stage ends where ours does; its race is reported. No times here."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.blip3o_models import Stage, dit_config, step_work
from benchmarks.blip3o_race import race, wrong_velocities
from benchmarks.report_blip3o import blip3o_section


@pytest.fixture(scope="module")
def result():
    return race(Stage.random("tiny", blocks=1), steps=2, rounds=2, pictures=2)


def test_the_reference_ends_at_the_same_latents(result):
    assert result["wrong"] == []
    errors = {(row["race"], row["name"]): row["error"] for row in result["rows"]}
    for name in ("one", "four"):
        assert errors[name, "faithful"] < 1e-5 and errors[name, "fast"] < 0.1
        assert errors[name, "reference"] is None


def test_section_shows_every_figure(result):
    whole = {
        **result, "size": "tiny", "ceilings": {"gemm_gflop_per_s": 160.0, "copy_gb_per_s": 20.0},
    }  # fmt: skip
    text = blip3o_section(whole)
    assert text.count("| reference |") == text.count("| fast |") == 2
    assert "2 pictures, from their prompt" in text and "160 GFLOP/s, 20.0 GB/s" in text
    assert "**Wrong:** all" in blip3o_section({**whole, "rows": [], "wrong": ["all"]})


def test_velocities_are_judged_before_anything_is_timed(result):
    errors = result["velocities"]
    assert errors["faithful"]["error"] <= errors["faithful"]["bar"] < 1e-4
    assert 1e-4 < errors["fast"]["error"] < 0.1
    missed = {**errors, "fast": {"error": 0.05, "bar": 0.03}}
    assert wrong_velocities(missed) == []
    whole = {**result, "size": "tiny", "velocities": missed, "rows": []}
    assert "fast 5.0e-02 (MISSES the bar 3.0e-02)" in blip3o_section(whole)
    for tier, error in (("fast", 0.2), ("faithful", 1e-3), ("fast", float("nan"))):
        wrong = {**errors, tier: {"error": error, "bar": 3e-2 if tier == "fast" else 1e-6}}
        assert len(wrong_velocities(wrong)) == 1


def test_work_of_a_step():
    """76.6 GMAC a sample (specs section A.16), less 13 to 14 % that does not change."""
    work = step_work(dit_config("4b", blocks=24), tokens=64, rows=1)
    assert work["gflop"] / 2 == pytest.approx(76.6 * 0.865, rel=0.02)
    assert work["weights_gb"] == pytest.approx(4.07, rel=0.01)
