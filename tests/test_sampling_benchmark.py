"""The sampling benchmark at tiny sizes, its sums and its report. No test here looks at a time."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import readme_table, report, report_sampling, sampling, sampling_growth
from benchmarks.growth_plot import growth_plot
from benchmarks.peers.sana_reference import ReferenceLoop
from benchmarks.sampling_bars import gpu_bars, summaries_of, verdict
from benchmarks.sampling_contenders import (
    ACCELERATED,
    EAGER,
    FAITHFUL,
    FAST,
    INDUCTOR,
    PIPELINE,
    Cast,
)
from benchmarks.sampling_models import Cell, Models, Workload, plan_spec, relative_error, step_flops
from clipflow.sampling import flow_schedule

CPU = torch.device("cpu")
CELL = Cell(model="tiny", blocks=2, batch=2, side=4)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampling") / "sampling.json"
    parts = [word for part in ("step", "run", "tiers", "plans") for word in ("--part", part)]
    assert sampling.main(["--tiny", "--quick", "--json", str(path), *parts]) == 0
    return json.loads(path.read_text())


def test_result_has_every_contender_with_its_ratios(result):
    rows = {(row["what"], row["contender"]): row for row in result["rows"]}
    for tier in (FAITHFUL, FAST, ACCELERATED):
        assert set(rows["run of 2 steps", tier]["times_faster_than"]) == {EAGER, PIPELINE}
    for tier in (FAITHFUL, FAST):
        assert set(rows["step", tier]["times_faster_than"]) == {EAGER}
    assert rows["step", FAITHFUL]["error"] <= 2 * rows["step", EAGER]["error"]
    assert rows["step", FAITHFUL]["error"] < 1e-5 < rows["step", FAST]["error"] < 3e-2
    assert result["wrong"] == [] and INDUCTOR in result["absent"]
    assert result["plans"]["first"]["plans"] == 4
    assert result["plans"]["again"] == {"plans": 0, "graphs": 0}
    (tier,) = result["tiers"]
    assert 0 < tier["fast_error_median"] <= tier["fast_error"] < 3e-2
    per_block, per_step = (tier[key][FAITHFUL] for key in ("kernels_per_block", "kernels_per_step"))
    assert 10 < per_block < 40 and 2 * per_block < per_step < 2 * per_block + 10


def test_report_shows_bars_losses_and_what_is_absent(result, tmp_path):
    slow = {"value": 0.9, "low": 0.8, "high": 1.0}
    for row in (r for r in result["rows"] if r["contender"] == FAST):
        row["times_faster_than"] = {peer: slow for peer in row["times_faster_than"]}
    result["summaries"] = summaries_of(result["rows"])
    (tmp_path / "s.json").write_text(json.dumps(result))
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    case = "tiny 2 blocks 16 tokens batch 2"
    assert (
        f"| step | tiny | fast | diffusers eager | 0.90 | 0.90 | 2.5 / 3.3 | MISS | {case}" in text
    )
    assert "diffusers eager **0.90 [0.80, 1.00]**" in text
    assert "**Not there:** diffusers Inductor" in text
    assert "2 sizes x 2 batches: 4 plans and 0 graphs made the first time, 0 and 0 when" in text
    assert "step, tiny, faithful / diffusers eager" in (tmp_path / "ratios.svg").read_text()


def test_readme_rows_of_sampling(result):
    text = readme_table.sampling_part(result)
    assert "| model | float32: eager | float32: Inductor | int8: eager | int8: Inductor |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| tiny, 2 blocks |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert float(cells[1].split()[0]) > 0 and float(cells[3].split()[0]) > 0
    assert cells[2] == cells[4] == "", "nothing was compiled in this run"


def test_reference_loop_is_ours():
    """diffusers' solver and model in UniLIP's loop, and our plan: the same schedule and latents."""
    steps = 4
    models, work = Models(CELL.config, CPU, torch.float32), Workload(CELL, CPU, torch.float32)
    cast = Cast(models, inductor=False, pipeline=False).of(CELL, work, steps, runs=True)
    loop = cast[EAGER].loop
    assert isinstance(loop, ReferenceLoop)
    assert loop.scheduler.timesteps.tolist() == flow_schedule(steps).timesteps.tolist()
    torch.testing.assert_close(loop.scheduler.sigmas, flow_schedule(steps).sigmas)
    wanted = cast[EAGER].run()
    assert relative_error(cast[FAITHFUL].run(), wanted) < 1e-5
    for _ in range(2 * steps):  # single steps go round
        cast[FAITHFUL].step()
        cast[EAGER].step()
    assert relative_error(cast[FAITHFUL].plan.loop.latents, cast[EAGER].loop.latents) < 1e-5
    assert relative_error(cast[EAGER].loop.latents, wanted) == 0


def test_a_wrong_contender_is_not_timed():
    models, work = Models(CELL.config, CPU, torch.float32), Workload(CELL, CPU, torch.float32)
    cast = Cast(models, inductor=False, pipeline=False)
    measurement = sampling.Measurement(CELL, cast, CPU, torch.float32)
    contenders = cast.of(CELL, work, 20, runs=False)
    velocity = contenders[FAITHFUL].velocity
    contenders[FAITHFUL].velocity = lambda rows, index: velocity(rows, index) * 1.001
    errors = measurement._check_velocities(contenders)
    assert FAITHFUL not in errors and {EAGER, FAST} <= set(errors)
    (line,) = measurement.wrong
    assert "faithful: 1.00e-03 >" in line


def test_flops_of_a_step_are_what_the_shapes_say():
    """Of UniLIP-1B with 256 tokens: 13.5 D^2 weights a block, twice 2 FLOP each, plus attention."""
    cell = Cell(model="unilip-1b", blocks=28, batch=1)
    gemms = 28 * 13.5 * 1152**2 * 2 * 512
    assert gemms < step_flops(cell) < 1.15 * gemms
    assert step_flops(Cell(model="unilip-1b", blocks=28, batch=4)) == 4 * step_flops(cell)


def test_plans_of_the_benchmark_are_those_of_the_pipeline():
    spec = plan_spec(CELL, 20, "faithful", CPU, torch.float32)
    assert spec.timesteps[:3] == (999, 982, 963) and spec.condition_length == 320
    assert spec.conditions == (1, 2) and spec.rows == 4


def test_verdicts_and_summaries():
    assert [verdict(v, 1.25, 1.5) for v in (1.2, 1.25, 1.6)] == ["MISS", "pass", "pass, aim met"]
    assert verdict(5.0, None, None) == ""
    head = {"what": "step", "blocks": 4, "tokens": 256, "contender": FAITHFUL, "peer": False}
    rows = [
        {**head, "model": model, "batch": batch, "times_faster_than": {EAGER: {"value": value}}}
        for model, batch, value in (("a", 1, 4.0), ("a", 4, 1.0), ("b", 1, 0.5))
    ]
    found = {s["model"]: s for s in summaries_of(rows)}
    assert list(found) == ["a", "b", "all"]
    assert found["a"]["geomean"] == pytest.approx(2.0) and found["a"]["must"] == 1.25
    assert found["all"]["worst"] == 0.5
    assert found["all"]["losses"] == ("b 4 blocks 256 tokens batch 1",)


def test_gpu_goals():
    size = {"model": "unilip-3b", "tokens": 256, "batch": 1}
    row = {**size, "contender": FAITHFUL, "times_faster_than": {EAGER: {"value": 9.0}}}
    graph = {**size, "tier": FAITHFUL, "graph_ms_per_step": 4.5}
    bars = {bar["name"].rpartition(": ")[2]: bar for bar in gpu_bars([row], [graph])}
    assert not bars["ms"]["met"] and bars["times faster than diffusers eager"]["met"]
    assert {bar["id"] for bar in bars.values()} == {"G12"}
    rates = ("tflop_per_s", "mfu", "weights_gb_per_s", "kernels_per_step", "plan_bytes")
    graph |= dict.fromkeys(rates, 1) | {"first_run_over_warm_s": 1.5}
    graph["time_line"] = [{"kernel": name, "us": us} for name, us in (("a", 1), ("b", 2), ("a", 3))]
    text = "\n".join(report_sampling.gpu_rows([graph]))
    assert "| 4.500 |" in text and "| `a` | 2 | 4.0 | 67% |" in text


def test_growth_finds_exponents_and_draws_them(tmp_path):
    assert sampling_growth.exponent((1, 2, 4), (3, 12, 48)) == pytest.approx(2.0)
    path = tmp_path / "growth.json"
    assert sampling.main(["--growth", "--tiny", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [curve["name"] for curve in found["curves"]] == ["batch", "steps"]
    for point in found["curves"][0]["points"]:
        assert point["seconds"] > 0 and point["plan_bytes"] > 0
    ElementTree.parse(tmp_path / "growth.svg")
    lines = ElementTree.fromstring(growth_plot(found["curves"]))
    assert len(lines.findall("{http://www.w3.org/2000/svg}polyline")) >= 4
    text = report.growth_section(found)
    assert "| batch | 2 |" in text and "growth.svg" in text
