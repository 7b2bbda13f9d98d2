"""Sampling and growth in the report: tables with the bars beside the figures, and losses."""

from __future__ import annotations

from benchmarks.report_text import ratio_text, table
from benchmarks.sampling_bars import bar_text, verdict

Result = dict[str, object]
NOTE = """Models have true widths and random weights; all contenders share them. *diffusers eager*
is UniLIP's loop on diffusers' own transformer, *diffusers Inductor* the same under torch.compile. A
step is one guided model call (two rows a sample) and the solver's update; a run also prepares the
conditions of new prompts, the null prompt being known. Rounds of larger batches and of full depth
go one way, each the other way than the last. Errors of steps are relative L2 against
float64, of runs against diffusers eager's latents. GFLOP/s count what each step must compute.
"""


def sampling_section(result: Result) -> str:
    settings, limits = result["settings"], result["ceilings"]
    lines = [
        f"{settings['device']}, {settings['dtype']}, {settings['rounds']} rounds. Ceilings of this "
        f"run: copy {limits['copy_gb_per_s']:.1f} GB/s, GEMM {limits['gemm_gflop_per_s']:.0f} "
        "GFLOP/s. Ratios are the peer's time over ours, with a 95 % interval; *cpu* is the same in "
        "processor time.\n",
        NOTE,
    ]
    lines += [f"**Wrong, not timed:** {line}\n" for line in result["wrong"]]
    lines += [f"**Not there:** {name}: {why}.\n" for name, why in result["absent"].items()]
    lines += summary_rows(result["summaries"]) + step_rows(result["rows"], limits)
    lines += gpu_bar_rows(result.get("gpu_bars", [])) + gpu_rows(result.get("gpu", []))
    lines += tier_rows(result["tiers"])
    if "image" in result:
        lines += image_rows(result["image"])
    if "plans" in result:
        p = result["plans"]
        lines.append(
            f"{p['sizes']} sizes x {p['batches']} batches: {p['first']['plans']} plans and "
            f"{p['first']['graphs']} graphs made the first time, {p['again']['plans']} and "
            f"{p['again']['graphs']} when all came again (bar: 0).\n"
        )
    return "\n".join(lines)


def summary_rows(summaries: list[Result]) -> list[str]:
    rows = [
        (s["what"], s["model"], s["contender"], s["peer"], f"{s['geomean']:.2f}",
         f"{s['worst']:.2f}", bar_text(s["must"], s["aim"]),
         verdict(s["geomean"], s["must"], s["aim"]), "; ".join(s["losses"]) or "none")
        for s in summaries
    ]  # fmt: skip
    header = ("what", "model", "ours", "peer", "geomean", "worst", "must / aim", "met", "losses")
    return table(header, rows)


def step_rows(found: list[Result], limits: dict[str, float]) -> list[str]:
    rows = []
    for r in found:
        ratios = [
            f"{peer} {ratio_text(ratio)} (cpu {r['times_less_cpu_than'][peer]['value']:.2f})"
            for peer, ratio in r["times_faster_than"].items()
            if not r["peer"]
        ]
        size = f"{r['model']}, {r['blocks']} blocks, {r['tokens']} tokens, batch {r['batch']}"
        share = f"{r['gflop_per_s'] / limits['gemm_gflop_per_s']:.0%}"
        rows.append((
            r["what"], size, r["contender"], f"{r['wall_s']:.4f}", f"{r['cpu_s']:.4f}",
            f"{r['gflop_per_s']:.0f}", share, f"{r['error']:.1e}", ", ".join(ratios),
        ))  # fmt: skip
    header = ("what", "size", "contender", "s", "cpu s", "GFLOP/s", "of GEMM", "error",
              "times faster than")  # fmt: skip
    return table(header, rows)


def tier_rows(tiers: list[Result]) -> list[str]:
    """Fast tier: largest error of a velocity over a run, and what both kinds of plan hold."""
    if not tiers:
        return []
    rows = []
    for t in tiers:
        size = f"{t['model']}, {t['blocks']} blocks, batch {t['batch']}, {t['weights']} weights"
        both = [
            " / ".join(f"{t[key][tier]:g}" for tier in ("faithful", "fast"))
            for key in ("kernels_per_block", "kernels_per_step")
        ]
        held = " / ".join(f"{t['plan_bytes'][k] / 2**20:.0f}" for k in ("faithful", "fast"))
        errors = [f"{t[key]:.2e}" for key in ("fast_error", "fast_error_median", "guided_error")]
        met = "pass" if t["fast_error"] <= 3e-2 else "MISS"
        rows.append((size, str(t["steps"]), *errors, f"{t['end_error']:.2e}", met, *both, held))
    header = (
        "model", "steps", "fast: error of a velocity, worst", "median", "worst after guidance",
        "of the latents", "bar 3e-2", "kernels a block, faithful / fast", "a step", "plan MiB",
    )  # fmt: skip
    return table(header, rows)


def image_rows(image: Result) -> list[str]:
    rows = [
        (r["name"], f"{r['wall_s']:.3f}", f"{r['cpu_s']:.3f}",
         ratio_text(r["times_faster_than_eager"]),
         f"{r['times_less_cpu_than_eager']['value']:.2f}", f"{r['error']:.1e}")
        for r in image["rows"]
    ]  # fmt: skip
    lines = [f"The embedded model, one picture of {image['steps']} steps, warm:\n"]
    header = ("path", "s", "cpu s", "times faster than eager", "cpu", "error of latents")
    lines += table(header, rows)
    bars = [
        (b["name"], f"{b['value']:.2f}", ("below " if b["at_most"] else "") + f"{b['bar']:g}",
         "pass" if b["met"] else "MISS")
        for b in image["bars"]
    ]  # fmt: skip
    lines += table(("faithful, prompt known", "measured", "bar", "met"), bars)
    cost = ratio_text(image["batch_invariant_cost"])
    return [
        *lines,
        f"A batch of {image['batch']} with batch_invariant=True: {cost} times as long.\n",
    ]


def gpu_bar_rows(bars: list[Result]) -> list[str]:
    if not bars:
        return []
    rows = [
        (b["id"], b["name"], f"{b['value']:.2f}", f"{b['must']:g}", "pass" if b["met"] else "MISS")
        for b in bars
    ]
    return table(("goal", "what", "measured", "bar", "met"), rows)


def gpu_rows(found: list[Result]) -> list[str]:
    if not found:
        return []
    rows = [
        (f"{g['model']}, {g['tokens']} tokens, batch {g['batch']}", g["tier"],
         f"{g['graph_ms_per_step']:.3f}", f"{g['tflop_per_s']:.0f}", f"{g['mfu']:.0%}",
         f"{g['weights_gb_per_s']:.0f}", str(g["kernels_per_step"]),
         f"{g['first_run_over_warm_s']:.2f}", f"{g['plan_bytes'] / 2**20:.0f}")
        for g in found
    ]  # fmt: skip
    header = ("size", "tier", "ms a step in the graph", "TFLOP/s", "MFU", "weights GB/s",
              "kernels a step", "first run over a warm one, s", "plan MiB")  # fmt: skip
    return [*table(header, rows), *time_line_rows(found[0])]


def time_line_rows(found: Result) -> list[str]:
    """The kernels of one step by the time they take together, longest first."""
    total: dict[str, list[float]] = {}
    for kernel in found["time_line"]:
        total.setdefault(kernel["kernel"], []).append(kernel["us"])
    step = sum(us for times in total.values() for us in times)
    rows = [
        (f"`{name[:80]}`", str(len(times)), f"{sum(times):.1f}", f"{sum(times) / step:.0%}")
        for name, times in sorted(total.items(), key=lambda item: -sum(item[1]))
    ]
    head = f"{found['model']}, {found['tokens']} tokens, batch {found['batch']}, {found['tier']}"
    lines = [f"Kernels of one step of {head}; in order in the JSON:\n"]
    return [*lines, *table(("kernel", "times", "us", "of the step"), rows)]


def growth_section(result: Result) -> str:
    header = ("against", "size", "s", "plan MiB", "peak MiB")
    lines = [f"One run of {result['base_steps']} steps of {result['base']}, but for what grows.\n"]
    rows, exponents = [], []
    for curve in result["curves"]:
        exponents.append((curve["name"], *(
            f"{curve['exponents'][key]:.2f}" if key in curve["exponents"] else ""
            for key in ("seconds", "plan_bytes", "peak_bytes")
        )))  # fmt: skip
        for size, p in zip(curve["sizes"], curve["points"], strict=True):
            memory = [f"{p[key] / 2**20:.0f}" for key in ("plan_bytes", "peak_bytes")]
            rows.append((curve["name"], str(size), f"{p['seconds']:.3f}", *memory))
    lines += table(("exponent against", "time", "plan", "peak memory"), exponents)
    return "\n".join([*lines, *table(header, rows), "![growth](growth.svg)\n"])
