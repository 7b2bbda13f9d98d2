"""Render the results in benchmarks/results/ as Markdown and an SVG plot of the ratios.

Run: python benchmarks/report.py [--results DIR] [--out DIR] [--short]

`--short` first measures, for CI: ops, sampling and imports with few rounds, and what GPU kernels
take. The newest result of each kind, device and dtype is shown. Every case is listed, losses too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.growth_plot import growth_plot
from benchmarks.machine import RESULTS
from benchmarks.ratio_plot import ratio_plot
from benchmarks.report_blip3o import blip3o_section
from benchmarks.report_sampling import growth_section, sampling_section
from benchmarks.report_text import ratio_text, table
from benchmarks.report_unilip import loading_section, unilip_section
from benchmarks.roofline_plot import roofline_plot

SHORT_RUN = RESULTS.parents[1] / "build" / "bench"
Result = dict[str, object]
PLOTS = """![ratios](ratios.svg)

A dot is the geometric mean over an op's cases, its line runs from the worst to the best case.

![roofline](roofline.svg)
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--out", type=Path, help="folder of the report; default: --results, or build/bench"
    )
    parser.add_argument("--short", action="store_true", help="measure quickly, and report that")
    args = parser.parse_args(argv)
    out = args.out or (SHORT_RUN if args.short else args.results)
    status = measure_short(out) if args.short else 0
    results = load(out if args.short else args.results)
    if not results:
        print(
            f"report: --results must hold JSON results, found none in {args.results}",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(render(results))
    (out / "ratios.svg").write_text(ratio_plot(ratio_bars(results)))
    (out / "roofline.svg").write_text(roofline(results))
    files = ["report.md", "ratios.svg", "roofline.svg"]
    for growth in (r for r in results if r["kind"] == "growth"):
        (out / "growth.svg").write_text(growth_plot(growth["curves"]))
        files.append("growth.svg")
    print(*(out / name for name in files), sep="\n")
    return status


def measure_short(folder: Path) -> int:
    """Measure quickly, leave the results in `folder`, and return 1 if anything was wrong."""
    from benchmarks import kernels, ops, sampling, startup  # only here: rendering needs no op

    # First: a new process begins with the peak memory of the one that it is forked from.
    startup.main(["--quick", "--json", str(folder / "startup.json")])
    wrong = ops.main(["--quick", "--json", str(folder / "ops.json")])
    wrong |= sampling.main(["--quick", "--json", str(folder / "sampling.json")])
    spilled = kernels.main(["--json", str(folder / "kernels.json")])
    return wrong or spilled


def load(folder: Path) -> list[Result]:
    """The newest result of each kind, device and dtype, in a fixed order."""
    newest: dict[tuple[str, ...], Result] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        settings = result.get("settings", {})
        key = (result["kind"], settings.get("device", ""), settings.get("dtype", ""))
        if key not in newest or result["date"] >= newest[key]["date"]:
            newest[key] = result
    return [newest[key] for key in sorted(newest)]


def render(results: list[Result]) -> str:
    """The whole report as Markdown."""
    sections = {
        "ops": ops_section,
        "sampling": sampling_section,
        "growth": growth_section,
        "startup": startup_section,
        "unilip": unilip_section,
        "blip3o": blip3o_section,
        "loading": loading_section,
        "kernels": kernels_section,
    }
    parts = ["# clipflow benchmarks\n", PLOTS]
    for result in results:
        parts += [heading(result), sections[result["kind"]](result)]
    return "\n".join(parts)


def heading(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    return (
        f"## {result['kind']}, {result['date']}\n\n"
        f"`{result['command']}` on {machine['cpu']} ({machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['instruction_set']}, load {machine['load']}), GPU "
        f"{machine['gpu'] or 'none'}; {versions}; commit {machine['commit'] or 'unknown'}.\n"
    )


def ops_section(result: Result) -> str:
    settings, limits = result["settings"], result["ceilings"]
    lines = [
        f"{settings['device']}, {settings['dtype']}, {settings['rounds']} rounds. Ceilings of this "
        f"run: copy {limits['copy_gb_per_s']:.1f} GB/s, GEMM {limits['gemm_gflop_per_s']:.0f} "
        "GFLOP/s. Ratios are the peer's time over ours, with a 95 % interval; *cpu* is the same in "
        "processor time.\n"
    ]
    lines += [f"**Wrong, not timed:** {line}\n" for line in result["wrong"]]
    lines += [
        f"**Warning, fell by more than a quarter:** {line}\n" for line in result.get("warnings", [])
    ]
    lines += summary_table(result["summaries"])
    header = ("op", "case", "backend", "us", "cpu us", "GB/s", "of copy", "times faster than")
    rows = []
    for row in result["rows"]:
        times = [f"{row['wall_us']:.1f}", f"{row['cpu_us']:.1f}", f"{row['gb_per_s']:.2f}"]
        ratios = [
            f"{peer} {ratio_text(ratio)} (cpu {row['times_less_cpu_than'][peer]['value']:.2f})"
            for peer, ratio in row["times_faster_than"].items()
            if not row["peer"]
        ]
        share = f"{row['share_of_copy']:.0%}"
        rows.append((row["op"], row["case"], row["backend"], *times, share, ", ".join(ratios)))
    lines += table(header, rows)
    host = [(h["op"], h["case"], h["backend"], f"{h['us']:.1f}") for h in result["host"]]
    lines += ["Host overhead of one call over an empty Python call:\n"]
    lines += table(("op", "case", "backend", "us"), host)
    return "\n".join(lines)


def summary_table(summaries: list[Result]) -> list[str]:
    rows = [
        (s["op"], s["backend"], s["peer"], f"{s['geomean']:.2f}", f"{s['worst']:.2f}",
         s["worst_case"], ", ".join(s["losses"]) or "none")
        for s in summaries
    ]  # fmt: skip
    return table(("op", "backend", "peer", "geomean", "worst", "worst case", "losses"), rows)


def startup_section(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        if "failed" in row:
            rows.append((row["name"], "failed: " + row["failed"], "", "no"))
        else:
            value, bar = (f"{row[key]:.2f} {row['unit']}" for key in ("value", "bar"))
            rows.append((row["name"], value, bar, "yes" if row["met"] else "**no**"))
    return "\n".join(table(("what", "measured", "at most", "met"), rows))


def kernels_section(result: Result) -> str:
    rows = [
        (r["compiler"], f"`{r['kernel']}`", r["arch"], str(r["registers"]), str(r["spilled_bytes"]),
         str(r["shared_bytes"]), f"{r['occupancy']:.0%}")
        for r in result["rows"]
    ]  # fmt: skip
    header = ("compiler", "kernel", "arch", "registers", "spilled B", "shared B", "occupancy")
    return "\n".join(table(header, rows))


def ratio_bars(results: list[Result]) -> list[tuple[str, dict[str, float]]]:
    """Label, and geometric mean with worst and best case, of all that is ours and every peer."""
    bars = []
    for result in (r for r in results if r["kind"] == "ops"):
        for s in result["summaries"]:
            label = f"{s['op']}, {s['backend']} / {s['peer']}, {result['settings']['dtype']}"
            bars.append((label, {"value": s["geomean"], "low": s["worst"], "high": s["best"]}))
    for result in (r for r in results if r["kind"] == "sampling"):
        for s in result["summaries"]:
            label = f"{s['what']}, {s['model']}, {s['contender']} / {s['peer']}"
            bars.append((label, {"value": s["geomean"], "low": s["worst"], "high": s["best"]}))
    return bars


def roofline(results: list[Result]) -> str:
    """The roofline of the first ops result: every case of every op, on its fastest backend."""
    for result in (r for r in results if r["kind"] == "ops"):
        fastest: dict[tuple[str, str], Result] = {}
        for row in (row for row in result["rows"] if not row["peer"]):
            key = (row["op"], row["case"])
            if key not in fastest or row["wall_us"] < fastest[key]["wall_us"]:
                fastest[key] = row
        points = [
            (row["op"], row["flops"] / row["bytes"], row["flops"] / row["wall_us"] / 1e3)
            for row in fastest.values()
        ]
        return roofline_plot(points, **result["ceilings"])
    return roofline_plot([], 1.0, 1.0)


if __name__ == "__main__":
    sys.exit(main())
