"""Write README.md's part about speed from the newest results.

Run: python benchmarks/readme_table.py [--check]
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import RESULTS
from benchmarks.report import load

Result = dict[str, object]
README = RESULTS.parents[1] / "README.md"
BEGIN = "<!-- speed: written by benchmarks/readme_table.py -->"
END = "<!-- end of speed -->"
TIERS = {"faithful": "float32", "fast": "int8"}
PEERS = {"diffusers eager": "eager", "diffusers Inductor": "Inductor"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="readme_table", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would")
    args = parser.parse_args(argv)
    old = README.read_text()
    new = replaced(old, speed(load(RESULTS)))
    if not args.check:
        README.write_text(new)
    return 1 if args.check and new != old else 0


def replaced(text: str, part: str) -> str:
    """`text` with `part` between the two markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: wanted one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{part}\n{END}{rest.split(END)[1]}"


def speed(results: list[Result]) -> str:
    """The part: ops, sampling where it was measured, and what a newcomer waits for."""
    found = {
        r["kind"]: r for r in results
        if r.get("settings", {}).get("device", "cpu") == "cpu" and not is_quick(r)
    }  # fmt: skip
    ops, startup = found["ops"], found["startup"]
    parts = [ops_part(ops)]
    if "sampling" in found:
        parts.append(sampling_part(found["sampling"]))
    whole = [part(found[kind]) for kind, part in WHOLE.items() if kind in found]
    if whole:
        parts.append(filled(" ".join(whole)) + "\n")
    parts.append(closing_part(ops, startup, on_gpu=any(on_gpu(r) for r in results)))
    return "\n".join(parts)


def is_quick(result: Result) -> bool:
    return bool(result.get("settings", {}).get("quick"))


def on_gpu(result: Result) -> bool:
    return result.get("settings", {}).get("device") == "cuda"


def ops_part(ops: Result) -> str:
    """The slowest and the fastest op against eager PyTorch and Inductor."""
    ratios = {
        (s["op"], s["peer"]): s for s in ops["summaries"] if s["backend"] == "native"
    }  # fmt: skip
    names = [op for op, peer in ratios if peer == "inductor" and op != "quantized_linear"]
    sizes = len({(r["op"], r["case"]) for r in ops["rows"] if r["op"] in names})
    losses = [case for op in names for peer in ("eager", "inductor")
              for case in ratios[op, peer]["losses"]]  # fmt: skip
    machine = ops["machine"]
    torch = ".".join(machine["versions"]["torch"].split(".")[:2])
    text = (
        f"Speed on {machine['cores']} cores of an {machine['cpu']} ({machine['instruction_set']}), "
        f"{ops['settings']['dtype']}, PyTorch {torch}. The fused ops (`clipflow bench ops`) are "
        f"{span(ratios, names, 'eager')} times as fast as eager PyTorch and "
        f"{span(ratios, names, 'inductor')} times as Inductor's code, in the geometric mean over "
        f"sizes of real models; slower at {len(losses) or 'none'} of {sizes} sizes."
    )
    return filled(text) + "\n"


def span(ratios: dict[tuple[str, str], Result], names: list[str], peer: str) -> str:
    """The least and the greatest geometric mean, with the ops that they belong to."""
    means = {op: ratios[op, peer]["geomean"] for op in names}
    ends = (min(means, key=means.get), max(means, key=means.get))
    return " to ".join(f"{means[op]:.1f} (`{op}`)" for op in ends)


def sampling_part(sampling: Result) -> str:
    """The table of sampling: a guided step of both tiers against diffusers."""
    found = {
        (s["what"], s["model"], s["contender"], s["peer"]): s for s in sampling["summaries"]
    }  # fmt: skip
    head = (
        "A guided sampling step of UniLIP's transformer (random weights, 256 tokens, "
        "`clipflow bench sampling`) against diffusers' own module in UniLIP's loop:"
    )
    columns = [(tier, peer) for tier in TIERS for peer in PEERS]
    titles = [f"{TIERS[tier]}: {PEERS[peer]}" for tier, peer in columns]
    lines = [filled(head), "", f"| model | {' | '.join(titles)} |", "|---" * 5 + "|"]
    for what, model in dict.fromkeys((what, model) for what, model, _, _ in found):
        if not what.startswith("step") or model == "all":
            continue
        cells = [
            f"{s['geomean']:.2f} ({s['worst']:.2f})" if (s := found.get((what, model, *c))) else ""
            for c in columns
        ]
        size = f"{model}, {blocks_of(sampling, what, model)} blocks"
        lines.append(f"| {size} | {' | '.join(cells)} |")
    lines.append("")
    return "\n".join(lines)


def unilip_part(unilip: Result) -> str:
    """A whole call of several pictures against the reference's loop."""
    race = unilip["race"]
    ratios = {r["name"]: r["times_faster"] for r in race["rows"] if "times_faster" in r}
    exact, fast = (ratios[tier]["call"]["value"] for tier in ("faithful", "fast"))
    return (
        f"{race['pictures']} pictures of one prompt, from text to pixels ({race['steps']} steps, "
        f"UniLIP-{unilip['size'].upper()} with {race['blocks']} blocks, random weights, `clipflow "
        f"bench unilip`), are drawn {exact:.1f} times as fast as by UniLIP's own loop on stock "
        f"transformers and diffusers in float32, {fast:.1f} times in int8."
    )


def blip3o_part(blip3o: Result) -> str:
    """Sampling of CLIP features against the reference's loop."""
    one, four = ([ratio_of(blip3o, race, tier) for tier in TIERS] for race in ("one", "four"))
    return (
        f"The CLIP features of a picture ({blip3o['steps']} steps, "
        f"BLIP3-o-{blip3o['size'].upper()} with {blip3o['blocks']} blocks, `clipflow bench "
        f"blip3o`): {one[0]:.1f} times as fast as by BLIP3-o's own loop, in int8 {one[1]:.1f} "
        f"times; of {blip3o['pictures']} pictures of a prompt {four[0]:.1f} and {four[1]:.1f} "
        "times."
    )


def ratio_of(blip3o: Result, race: str, tier: str) -> float:
    """How many times faster than the reference `tier` was."""
    (row,) = (r for r in blip3o["rows"] if (r["race"], r["name"]) == (race, tier))
    return row["times_faster"]["value"]


# Kind of a result -> a sentence about whole calls.
WHOLE = {"unilip": unilip_part, "blip3o": blip3o_part}


def blocks_of(sampling: Result, what: str, model: str) -> int:
    return next(
        r["blocks"] for r in sampling["rows"] if (r["what"], r["model"]) == (what, model)
    )  # fmt: skip


def closing_part(ops: Result, startup: Result, *, on_gpu: bool) -> str:
    int8 = {
        s["peer"]: mean_and_worst(s) for s in ops["summaries"]
        if (s["op"], s["backend"]) == ("quantized_linear", "native")
    }  # fmt: skip
    rows = {row["name"]: row["value"] for row in startup["rows"]}
    text = (
        f"`quantized_linear` (int8, quantization included) is {int8['float32 linear']} times as "
        f"fast as the float32 layer, {int8['torch dynamic int8']} times as PyTorch's dynamic int8. "
        "A picture from a fresh process takes "
        f"{rows['clipflow generate, start to file']:.1f} s and "
        f"{rows['clipflow generate, peak memory']:.2f} GB, in a warm one "
        f"{rows['one image in a warm process']:.2f} s (`clipflow bench startup`). "
        + ("" if on_gpu else "No GPU kernel has been timed yet. ")
        + "All cases and intervals: [benchmarks/results/report.md](benchmarks/results/report.md)."
    )
    return filled(text) + "\n"


def mean_and_worst(summary: Result) -> str:
    return f"{summary['geomean']:.1f} ({summary['worst']:.1f})"


def filled(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    sys.exit(main())
