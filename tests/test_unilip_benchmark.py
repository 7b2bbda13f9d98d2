"""The restated reference draws what the pipeline draws; its race is reported. No times here."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.readme_table import unilip_part
from benchmarks.report_unilip import loading_section, unilip_section
from benchmarks.unilip_race import race
from clipflow.testing import write_unilip_folder


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = write_unilip_folder(tmp_path_factory.mktemp("unilip") / "tiny")
    return race(folder, steps=2, rounds=1, pictures=1)


def test_the_reference_ends_at_the_same_latents(result):
    errors = {row["name"]: row["error"] for row in result["rows"]}
    assert errors["faithful"] < 1e-5 and errors["fast"] < 0.1
    assert result["wrong"] == []


def test_sections_show_every_figure(result):
    part = {"name": "decoder", "seconds": 2.0, "gflop": 2092, "gflop_per_s": 1046.0}
    uncounted = {"name": "DiT step", "seconds": 0.5, "gflop": None, "gflop_per_s": None}
    whole = {
        "size": "1b", "peak_gb": 7.25, "ceilings": {"gemm_gflop_per_s": 160.0},
        "calls": [{"name": "load as stored", "seconds": 1.5}],
        "parts": [part, uncounted], "race": {**result, "wrong": ["faithful: 1e0"]},
    }  # fmt: skip
    text = unilip_section(whole)
    assert "| decoder | 2.000 | 2092 | 1046 |" in text and "| DiT step | 0.500 |  |  |" in text
    assert "7.25 GB" in text and "**Wrong:** faithful: 1e0" in text
    for row in result["rows"]:
        assert f"| {row['name']} |" in text
    assert "1 pictures of one prompt" in unilip_part(whole)


def test_loading_section():
    row = {"name": "time", "value": 1.25, "bar": 1.3, "met": True}
    loading = {
        "folder_bytes": 2e9,
        "seconds": {"plain": 1.0},
        "rows": [row, {**row, "name": "memory", "met": False}],
    }
    text = loading_section(loading)
    assert "2.00 GB" in text and "| time | 1.250 | 1.3 | yes |" in text and "| **no** |" in text
