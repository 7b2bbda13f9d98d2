"""Whole UniLIPs in the report: loading, seconds of calls and parts, the race with the reference."""

from __future__ import annotations

from benchmarks.report_text import ratio_text, table

Result = dict[str, object]
PHASES = {"condition": "condition", "sampling": "sampling", "latents": "both", "decode": "decoding",
          "call": "whole call"}  # fmt: skip
RACE = """{pictures} pictures of one new prompt, {blocks} blocks of true width, {steps} steps, the \
null prompt known. *reference* is UniLIP's loop restated on stock transformers and diffusers, one \
call a picture. Ratios are its time over ours, with a 95 % interval; bar for the whole call in the \
faithful tier: {bar}. Errors are relative L2 of the latents against the reference's.
"""


def unilip_section(result: Result) -> str:
    limit = result["ceilings"]["gemm_gflop_per_s"]
    lines = [
        f"UniLIP-{result['size']}, random weights, float32 unless said otherwise. Peak memory of "
        f"the process {result['peak_gb']:.2f} GB; GEMM ceiling of this run {limit:.0f} GFLOP/s.\n"
    ]
    calls = [(call["name"], f"{call['seconds']:.2f}") for call in result["calls"]]
    lines += table(("call", "s"), calls)
    parts = []
    for part in result["parts"]:
        counted = part["gflop"] is not None
        rate = f"{part['gflop_per_s']:.0f}" if counted else ""
        parts.append((part["name"], f"{part['seconds']:.3f}", f"{part['gflop'] or ''}", rate))
    lines += table(("part, one call", "s", "GFLOP", "GFLOP/s"), parts)
    return "\n".join(lines + race_rows(result["race"]))


def loading_section(result: Result) -> str:
    size = result["folder_bytes"] / 1e9
    seconds = ", ".join(f"{name} {s:.2f} s" for name, s in result["seconds"].items())
    rows = [
        (r["name"], f"{r['value']:.3f}", f"{r['bar']}", "yes" if r["met"] else "**no**")
        for r in result["rows"]
    ]
    lines = [f"A folder of {size:.2f} GB in bfloat16, files in the system's cache: {seconds}.\n"]
    return "\n".join(lines + table(("what", "measured", "at most", "met"), rows))


def race_rows(race: Result) -> list[str]:
    lines = [RACE.format(**{key: race[key] for key in ("pictures", "blocks", "steps", "bar")})]
    lines += [f"**Wrong:** {line}\n" for line in race["wrong"]]
    rows = []
    for row in race["rows"]:
        seconds = [sum(row["rounds"][phase]) / race["rounds"] for phase in PHASES]
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        rows.append((row["name"], *(f"{s:.1f} s" for s in seconds), error))
        if "times_faster" in row:
            ratios = [ratio_text(row["times_faster"][phase]) for phase in PHASES]
            rows.append((f"{row['name']}, times faster", *ratios, ""))
    return lines + table(("", *PHASES.values(), "error"), rows)
