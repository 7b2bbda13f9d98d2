"""The benchmarks' arithmetic and reports. No test here looks at a time."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import baseline, kernels, readme_table, report, startup
from benchmarks.contenders import error_meter
from benchmarks.ratio_plot import FASTER, SLOWER, ratio_plot
from benchmarks.ratios import geomean, paired_ratio, summarize
from benchmarks.roofline_plot import roofline_plot
from benchmarks.timing import interleaved
from clipflow.ops import all_ops

MACHINE = {
    "cpu": "Some CPU", "cores": 2, "threads": 2, "instruction_set": "AVX2", "load": 0.1,
    "gpu": None, "versions": {"torch": "2.13.0"}, "commit": "abc",
}  # fmt: skip


def ops_result(date: str, ratio: float) -> dict[str, object]:
    paired = {"value": ratio, "low": ratio * 0.9, "high": ratio * 1.1}
    row = {
        "op": "adaln_norm", "case": "B2-L64-D192", "backend": "native", "peer": False,
        "wall_us": 20.0, "cpu_us": 40.0, "bytes": 1e5, "flops": 1e5,
        "gb_per_s": 5.0, "share_of_copy": 0.5, "error": 1e-6,
        "times_faster_than": {"eager": paired}, "times_less_cpu_than": {"eager": paired},
    }  # fmt: skip
    summary = {"op": "adaln_norm", "backend": "native", "peer": "eager"}
    return {
        "kind": "ops", "date": date, "command": "python benchmarks/ops.py", "machine": MACHINE,
        "settings": {"device": "cpu", "dtype": "float32", "rounds": 5},
        "ceilings": {"copy_gb_per_s": 10.0, "gemm_gflop_per_s": 50.0}, "rows": [row],
        "summaries": [{**summary, **vars(summarize({"B2-L64-D192": ratio}))}],
        "host": [{"op": "adaln_norm", "case": "B1-L1-D8", "backend": "native", "us": 9.0}],
        "wrong": [],
    }  # fmt: skip


def test_geomean():
    assert geomean([2.0, 8.0]) == pytest.approx(4.0)
    for bad in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="geomean: values must be positive"):
            geomean(bad)


def test_paired_ratio_takes_drift_out():
    """A machine that slows down threefold slows both; the pairs still say exactly 2."""
    ours = [1.0, 2.0, 3.0, 1.5, 2.5]
    ratio = paired_ratio([2 * time for time in ours], ours)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_paired_ratio_interval():
    peer = [1.8, 2.0, 2.2, 1.9, 2.1, 2.3, 1.7]
    ours = [1.0] * len(peer)
    ratio = paired_ratio(peer, ours)
    assert min(peer) < ratio.low < ratio.value < ratio.high < max(peer)
    assert ratio == paired_ratio(peer, ours)
    wider = paired_ratio([time**3 for time in peer], ours)
    assert wider.high / wider.low > ratio.high / ratio.low
    with pytest.raises(ValueError, match="rounds must be equal, got 7 and 3"):
        paired_ratio(peer, [1.0] * 3)


def test_paired_ratio_covers_the_truth():
    """Of 200 sets of noisy rounds around 1.5, the interval holds 1.5 nearly as often as it says."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        noise = torch.randn(12, generator=generator).mul(0.1).exp().tolist()
        ratio = paired_ratio([1.5 * n for n in noise], [1.0] * 12)
        held += ratio.low <= 1.5 <= ratio.high
    assert held >= 170


def test_summary_shows_worst_and_losses():
    summary = summarize({"a": 4.0, "b": 0.5, "c": 1.0, "d": 0.8})
    assert summary.worst == 0.5
    assert summary.worst_case == "b"
    assert summary.losses == ("b", "d")
    assert summary.geomean == pytest.approx(1.6**0.25)


def test_interleaved_goes_there_and_back():
    order: list[str] = []
    contenders = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(contenders, rounds=3, block_seconds=0.0, device=torch.device("cpu"))
    assert [len(times[name].wall) for name in "ab"] == [3, 3]
    assert [len(times[name].cpu) for name in "ab"] == [3, 3]
    assert order[-12:] == list("abba") * 3


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "capability", "share"),
    [
        (32, 0, 256, 80, 1.0),
        (64, 0, 256, 90, 0.5),  # 65,536 registers hold 32 warps of 64 registers a thread
        (128, 0, 512, 90, 0.25),
        (32, 100 * 1024, 128, 90, 8 / 64),  # two blocks of 4 warps by shared memory
        (32, 0, 1024, 86, 32 / 48),  # one block of 32 warps fits in 48
    ],
)
def test_occupancy(registers, shared, threads, capability, share):
    assert kernels.occupancy(registers, shared, threads, capability) == pytest.approx(share)


def test_startup_rows_say_met_or_missed():
    assert startup.row("import", 0.5, "s", 1.0)["met"]
    assert "MISSED" in startup.row_text(startup.row("import", 1.5, "s", 1.0))
    assert "FAILED: no model" in startup.row_text({"name": "warm", "failed": "no model"})


def test_timed_process():
    process = startup.timed([sys.executable, "-c", "print('hello')"])
    assert process.output == "hello\n"
    assert process.peak_gb > 0
    with pytest.raises(startup.Failed, match="exit status 3: what went wrong"):
        startup.timed(["/bin/sh", "-c", "echo what went wrong >&2; exit 3"])


def test_report_shows_the_newest_result_and_losses(tmp_path):
    for date, ratio in (("2026-01-01 10:00 UTC", 3.0), ("2026-01-02 10:00 UTC", 0.8)):
        (tmp_path / f"{date[:10]}-ops.json").write_text(json.dumps(ops_result(date, ratio)))
    row = startup.row("one image", 1.5, "s", 1.0)
    head = {"date": "2026-01-01 10:00 UTC", "command": "x", "machine": MACHINE}
    startup_result = {"kind": "startup", **head, "rows": [row]}
    kernel = {
        "compiler": "nvcc", "kernel": "k<float>", "arch": "sm_80", "registers": 40,
        "spilled_bytes": 0, "shared_bytes": 256, "occupancy": 0.75,
    }  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(startup_result))
    (tmp_path / "k.json").write_text(json.dumps({"kind": "kernels", **head, "rows": [kernel]}))
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "2026-01-02" in text
    assert "eager **0.80 [0.72, 0.88]** (cpu 0.80)" in text
    assert "| adaln_norm | native | eager | 0.80 | 0.80 | B2-L64-D192 | B2-L64-D192 |" in text
    assert "3.00" not in text
    assert "| one image | 1.50 s | 1.00 s | **no** |" in text
    assert "| nvcc | `k<float>` | sm_80 | 40 | 0 | 256 | 75% |" in text
    for plot in ("ratios.svg", "roofline.svg"):
        ElementTree.parse(tmp_path / "out" / plot)


def test_report_without_results(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "--results must hold JSON results" in capsys.readouterr().err


def test_plot_is_valid_and_colors_losses():
    bars = [("a < b", {"value": 2.0, "low": 1.5, "high": 2.5})]
    assert SLOWER not in ratio_plot(bars)
    bars.append(("c", {"value": 0.5, "low": 0.4, "high": 0.6}))
    plot = ratio_plot(bars)
    assert plot.count(FASTER) == 2
    assert plot.count(SLOWER) == 2
    root = ElementTree.fromstring(plot)
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert float(circles[0].get("cx")) > float(circles[1].get("cx"))
    ElementTree.fromstring(ratio_plot([]))


def test_roofline_has_a_dot_a_case_below_its_roof():
    points = [("adaln_norm", 0.5, 10.0), ("glu_conv", 20.0, 90.0)]
    plot = ElementTree.fromstring(roofline_plot(points, 30.0, 100.0))
    svg = "{http://www.w3.org/2000/svg}"
    dots = plot.findall(f"{svg}circle")
    assert len(dots) == 2
    roof = plot.find(f"{svg}polyline").get("points").split()
    highest = min(float(corner.split(",")[1]) for corner in roof)  # y points down
    assert all(float(dot.get("cy")) > highest for dot in dots)
    assert len(plot.findall(f"{svg}text")) > 4


def test_a_fall_of_more_than_a_quarter_is_a_warning(tmp_path):
    accepted = tmp_path / "baseline.json"
    baseline.accept(ops_result("2026-01-01", 4.0), accepted)
    known = baseline.load(accepted)
    assert known == {"cpu float32 adaln_norm native / eager": 4.0}
    assert baseline.warnings(ops_result("2026-01-02", 3.1), known) == []
    (line,) = baseline.warnings(ops_result("2026-01-02", 2.9), known)
    assert line == "cpu float32 adaln_norm native / eager: 2.90x, accepted was 4.00x"
    assert baseline.main([str(tmp_path / "missing.json")]) == 2


def test_a_wrong_result_is_seen():
    op = next(op for op in all_ops() if op.name == "adaln_norm")
    case = op.cases[1]
    inputs = case.inputs(torch.device("cpu"), torch.float32)
    meter = error_meter(op, case, inputs)
    right = case.of(op.public)(*inputs, **case.options(inputs[0].device))
    error, allowed = meter(right)
    assert error <= allowed
    error, allowed = meter(right + 1e-3)
    assert error > allowed


def test_every_file_of_peers_belongs_to_an_op_or_a_model():
    files = {path.stem for path in (Path(report.__file__).parent / "peers").glob("*.py")}
    models = {f"{name}_reference" for name in ("sana", "unilip", "lumina", "blip3o")}
    assert files <= models | {op.name for op in all_ops()}


def test_readme_says_what_the_results_say():
    """After new results: python benchmarks/readme_table.py."""
    assert readme_table.main(["--check"]) == 0
    with pytest.raises(ValueError, match="wanted one <!-- speed"):
        readme_table.replaced("no markers", "part")
    text = f"a\n{readme_table.BEGIN}\nold\n{readme_table.END}\nb"
    wanted = f"a\n{readme_table.BEGIN}\n\nnew\n\n{readme_table.END}\nb"
    assert readme_table.replaced(text, "new\n") == wanted
