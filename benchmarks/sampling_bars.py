"""What the sampling benchmark is held to, and its ratios summed up against that."""

from __future__ import annotations

from benchmarks.ratios import summarize
from benchmarks.sampling_contenders import EAGER, FAITHFUL, FAST, INDUCTOR

Result = dict[str, object]

# (contender, peer) -> (must, aim): times faster, geometric mean over the steps of all sizes.
BARS: dict[tuple[str, str], tuple[float, float | None]] = {
    (FAITHFUL, EAGER): (1.25, 1.5),
    (FAITHFUL, INDUCTOR): (1.1, None),
    (FAST, EAGER): (2.5, 3.3),
    (FAST, INDUCTOR): (2.0, None),
}
# Of UniLIP-3B's transformer on a GPU: (tokens, batch) -> goal, ms of a step in the graph, times
# faster than diffusers eager and than Inductor.
GPU_GOALS = {
    (1024, 1): ("G11", 12.5, 3.0, 1.25),
    (256, 1): ("G12", 4.0, 8.0, 1.4),
    (256, 8): ("G13", 21.0, 1.8, 1.15),
    (1024, 8): ("G13", 78.0, 1.8, 1.15),
}


def summaries_of(rows: list[Result]) -> list[Result]:
    """Geometric mean, worst case, losses and verdict of each of ours against each peer.

    Of each kind of measurement, for every model by itself and, where there are several, for all.
    """
    grouped: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in (row for row in rows if not row["peer"]):
        case = f"{row['model']} {row['blocks']} blocks {row['tokens']} tokens batch {row['batch']}"
        for peer, ratio in row["times_faster_than"].items():
            for group in (row["model"], "all"):
                key = (row["what"], group, row["contender"], peer)
                grouped.setdefault(key, {})[case] = ratio["value"]
    found = []
    for (what, group, contender, peer), ratios in grouped.items():
        own = [g for w, g, c, p in grouped if (w, c, p) == (what, contender, peer)]
        if group == "all" and len(own) == 2:
            continue  # one model: the same as its own line
        head = {"what": what, "model": group, "contender": contender, "peer": peer}
        must, aim = BARS.get((contender, peer), (None, None))
        summary = summarize(ratios)
        found.append({**head, **vars(summary), "must": must, "aim": aim})
    order = {name: place for place, name in enumerate(dict.fromkeys(r["model"] for r in rows))}
    return sorted(found, key=lambda s: (s["what"], order.get(s["model"], len(order))))


def gpu_bars(rows: list[Result], graphs: list[Result]) -> list[Result]:
    """The goals of steps on a GPU, each with what was measured; `graphs` are times without peers.

    Of a faithful plan; "at_most" goals are milliseconds, others ratios.
    """
    bars = []

    def add(goal: str, name: str, value: float, must: float, *, at_most: bool) -> None:
        met = value <= must if at_most else value >= must
        bars.append({"id": goal, "name": name, "value": value, "must": must, "met": met})

    for (tokens, batch), (goal, most_ms, over_eager, over_inductor) in GPU_GOALS.items():
        case = f"unilip-3b, {tokens} tokens, batch {batch}"
        wanted = {"model": "unilip-3b", "tokens": tokens, "batch": batch}
        for found in (g for g in graphs if wanted.items() <= g.items() and g["tier"] == FAITHFUL):
            add(goal, f"{case}: ms", found["graph_ms_per_step"], most_ms, at_most=True)
        for row in rows:
            if wanted.items() <= row.items() and row["contender"] == FAITHFUL:
                for peer, must in ((EAGER, over_eager), (INDUCTOR, over_inductor)):
                    if peer in row["times_faster_than"]:
                        value = row["times_faster_than"][peer]["value"]
                        add(goal, f"{case}: times faster than {peer}", value, must, at_most=False)
    return bars


def verdict(value: float, must: float | None, aim: float | None) -> str:
    """ "pass", "pass, aim met", "MISS", or nothing where there is no bar."""
    if must is None:
        return ""
    if value < must:
        return "MISS"
    return "pass, aim met" if aim is not None and value >= aim else "pass"


def bar_text(must: float | None, aim: float | None) -> str:
    if must is None:
        return ""
    return f"{must:g}" if aim is None else f"{must:g} / {aim:g}"


def print_summaries(summaries: list[Result]) -> None:
    for s in summaries:
        judged = verdict(s["geomean"], s["must"], s["aim"])
        held = f", bar {bar_text(s['must'], s['aim'])}: {judged}" if judged else ""
        print(
            f"{s['what']}, {s['model']}: {s['contender']} against {s['peer']}: geomean "
            f"{s['geomean']:.2f}x, worst {s['worst']:.2f}x ({s['worst_case']}){held}; losses: "
            f"{', '.join(s['losses']) or 'none'}"
        )
