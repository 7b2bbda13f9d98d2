"""BLIP3-o's first stage in the report: the race with the reference, and what bounds a step."""

from __future__ import annotations

import statistics

from benchmarks.report_text import ratio_text, table

Result = dict[str, object]
TITLES = {
    "one": "one picture, from its condition",
    "four": "{pictures} pictures, from their prompt",
}
HEAD = """BLIP3-o-{size} with {blocks} blocks of the transformer, {steps} steps, guidance 3, random
weights, float32. *reference* is BLIP3-o's loop restated on stock transformers and diffusers, one
call a picture. Ratios are its time over ours in the same round, with a 95 % interval; errors are
relative L2 of the latents against the reference's.
"""
FLOOR = """A step of one picture needs {gflop:.1f} GFLOP and {weights_gb:.2f} GB of weights. At the
ceilings of this run ({gemm:.0f} GFLOP/s, {copy:.1f} GB/s) that takes {compute:.1f} ms or {read:.1f}
ms; the faithful tier takes {taken:.1f} ms ({share:.0f} % of the time is the larger of the two).
"""


def blip3o_section(result: Result) -> str:
    lines = [HEAD.format(**{key: result[key] for key in ("size", "blocks", "steps")})]
    lines += [f"**Wrong:** {line}\n" for line in result["wrong"]]
    rows = []
    for row in result["rows"]:
        title = TITLES[row["race"]].format(**result)
        ratio = bar = ""
        if "times_faster" in row:
            ratio = ratio_text(row["times_faster"])
            bar = row["bar"] or ""
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        seconds = f"{statistics.median(row['seconds']):.2f} s"
        rows.append((title, row["name"], seconds, ratio, str(bar), error))
    lines += table(("", "who", "median", "times faster", "bar", "error"), rows)
    return "\n".join([*lines, *floor(result), *velocities(result)])


def velocities(result: Result) -> list[str]:
    """How far a velocity of each tier is from float64."""
    said = [
        f"{tier} {found['error']:.1e} ({'within' if found['error'] <= found['bar'] else 'MISSES'} "
        f"the bar {found['bar']:.1e})"
        for tier, found in result["velocities"].items()
    ]
    return [
        "A velocity in the middle of a run, relative L2 from float64: " + "; ".join(said) + ".\n"
    ]


def floor(result: Result) -> list[str]:
    """What a faithful step of one picture cannot do without, beside what it takes."""
    times = [r["seconds"] for r in result["rows"] if (r["race"], r["name"]) == ("one", "faithful")]
    if not times:
        return []
    step, limits = result["step"], result["ceilings"]
    gemm, copy = limits["gemm_gflop_per_s"], limits["copy_gb_per_s"]
    compute, read = 1e3 * step["gflop"] / gemm, 1e3 * step["weights_gb"] / copy
    taken = 1e3 * statistics.median(times[0]) / result["steps"]
    return [
        FLOOR.format(
            **step, gemm=gemm, copy=copy, compute=compute, read=read, taken=taken,
            share=100 * max(compute, read) / taken,
        )
    ]  # fmt: skip
