"""Time every registered op on every backend against eager PyTorch, torch.compile and its peers.

Run: python benchmarks/ops.py [--op adaln_norm] [--device cpu] [--dtype float32] [--quick]

On each case the results are compared with float64 first; a wrong backend is not timed and the run
fails. Contenders are then timed in turn, in one process, together with a plain copy of as many
bytes as the op must move. Ratios are paired by round, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import baseline, contenders
from benchmarks.contenders import GENERAL_PEERS
from benchmarks.machine import ceilings, facts, keep_freed_memory, write_result
from benchmarks.ratios import paired_ratio, summarize
from benchmarks.timing import Call, Times, interleaved
from clipflow.ops import all_ops
from clipflow.registry import Case, Op

Result = dict[str, object]


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    ops = [op for op in all_ops() if args.op in (None, op.name)]
    if not ops:
        names = ", ".join(op.name for op in all_ops())
        print(f"ops: --op must be one of {names}, got {args.op!r}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    keep_freed_memory()
    machine = facts()
    print(f"{machine['cpu']}, {machine['threads']} threads, GPU {machine['gpu']}")
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, {args.rounds} rounds")
    limits = ceilings(device, dtype, quick=args.quick)
    print("copy {copy_gb_per_s:.1f} GB/s, GEMM {gemm_gflop_per_s:.0f} GFLOP/s".format(**limits))

    rows, wrong, hosts = [], [], []
    todo = [(op, case) for op in ops for case in chosen_cases(op, quick=args.quick)]
    for op, case in tqdm(todo, unit="case", disable=None):  # no bar in a log file
        found, failed = measure(op, case, device, dtype, args)
        rows += found
        wrong += failed
    for op in ops:
        hosts += host_overhead(op, device, dtype, args)

    summaries = summaries_of(rows)
    print_summaries(summaries, hosts)
    settings = {"device": args.device, "dtype": args.dtype, "rounds": args.rounds}
    body = {"settings": settings, "ceilings": limits, "rows": rows, "summaries": summaries}
    body["warnings"] = baseline.warnings(body, baseline.load())
    for line in wrong:
        print(f"WRONG, not timed: {line}", file=sys.stderr)
    for line in body["warnings"]:
        print(f"warning: fell by more than a quarter: {line}", file=sys.stderr)
    print(write_result("ops", {**body, "host": hosts, "wrong": wrong}, args.json))
    return 1 if wrong else 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ops", description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="one op; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7, help="A-B-B-A rounds, at least 5")
    parser.add_argument(
        "--quick", action="store_true", help="5 short rounds, without torch.compile"
    )
    parser.add_argument("--json", type=Path, help="result file; default: a dated one in results/")
    args = parser.parse_args(argv)
    args.rounds = 5 if args.quick else max(5, args.rounds)
    args.block = 0.01 if args.quick else 0.03
    return args


def chosen_cases(op: Op, *, quick: bool) -> tuple[Case, ...]:
    """All timed sizes; the first, middle and last of them in a quick run."""
    most = len(op.timed)
    return tuple(op.timed[i] for i in sorted({0, most // 2, most - 1})) if quick else op.timed


def measure(
    op: Op, case: Case, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> tuple[list[Result], list[str]]:
    """Rows of one case, one a contender, and a line for each contender with wrong results."""
    inputs = case.inputs(device, dtype)
    calls = contenders.backends_of(op, case, inputs)
    if not args.quick:
        calls["inductor"] = contenders.compiled(op, case, inputs)
    measure_error = contenders.error_meter(op, case, inputs)
    errors, wrong = {}, []
    for name, call in calls.items():
        errors[name], allowed = measure_error(call())
        if errors[name] > allowed:
            wrong.append(f"{op.name} {case.name} {name}: {errors[name]:.2e} > {allowed:.2e}")
            calls[name] = None
    timed: dict[str, Call] = {name: call for name, call in calls.items() if call is not None}
    peers = contenders.special_peers(op, case, inputs)
    moved = sum(t.nbytes for t in (*inputs, *contenders.tensors(timed["eager"]())))
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    times = interleaved(
        {**timed, **peers, "copy": partial(target.copy_, source)},
        rounds=args.rounds,
        block_seconds=args.block,
        device=device,
    )
    named = [*peers, *GENERAL_PEERS]
    head = {"op": op.name, "case": case.name, "device": device.type, "dtype": args.dtype}
    work = {"bytes": moved, "flops": case.of(op.flops)(*inputs, **case.options(device))}
    rows = [
        {
            **head, "backend": name, "peer": name in named, "error": errors.get(name),
            **work, **timings(name, times, named, moved),
        }
        for name in (*timed, *peers)
    ]  # fmt: skip
    print_rows(rows)
    return rows, wrong


def timings(name: str, times: dict[str, Times], peers: list[str], moved: int) -> Result:
    """Microseconds, rates, and paired ratios against every peer but itself."""
    ours, others = times[name], [p for p in peers if p in times and p != name]
    return {
        "wall_us": ours.median * 1e6,
        "cpu_us": ours.median_cpu * 1e6,
        "gb_per_s": moved / ours.median / 1e9,
        "share_of_copy": times["copy"].median / ours.median,
        "times_faster_than": {p: vars(paired_ratio(times[p].wall, ours.wall)) for p in others},
        # Wall time on a shared machine measures the neighbors too; processor time does not.
        "times_less_cpu_than": {p: vars(paired_ratio(times[p].cpu, ours.cpu)) for p in others},
    }


def host_overhead(
    op: Op, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> list[Result]:
    """Microseconds that one call costs beyond an empty Python call, on the op's smallest case."""
    case = min(op.cases, key=lambda case: case.inputs(device, dtype)[0].numel())
    calls = contenders.backends_of(op, case, case.inputs(device, dtype))
    times = interleaved(
        {**calls, "empty": lambda: None},
        rounds=args.rounds,
        block_seconds=args.block,
        device=device,
    )
    empty = times.pop("empty").median
    return [
        {"op": op.name, "case": case.name, "backend": name, "us": (t.median - empty) * 1e6}
        for name, t in times.items()
    ]


def summaries_of(rows: list[Result]) -> list[Result]:
    """Geometric mean, worst case and losses of each op and backend against each peer."""
    grouped: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        for peer, ratio in row["times_faster_than"].items():
            if not row["peer"]:
                key = (row["op"], row["backend"], peer)
                grouped.setdefault(key, {})[row["case"]] = ratio["value"]
    return [
        {"op": op, "backend": backend, "peer": peer, **vars(summarize(ratios))}
        for (op, backend, peer), ratios in grouped.items()
    ]


def print_rows(rows: list[Result]) -> None:
    for row in rows:
        text = f"{row['op']:<22}{row['case']:<36}{row['backend']:<12}{row['wall_us']:>11.1f} us"
        text += f"{row['cpu_us']:>11.1f} cpu us{row['gb_per_s']:>8.1f} GB/s"
        for peer, r in row["times_faster_than"].items():
            text += f"  {r['value']:.2f}x {peer} [{r['low']:.2f}, {r['high']:.2f}]"
        tqdm.write(text)


def print_summaries(summaries: list[Result], hosts: list[Result]) -> None:
    for s in summaries:
        print(
            f"{s['op']} {s['backend']} against {s['peer']}: geomean {s['geomean']:.2f}x, worst "
            f"{s['worst']:.2f}x ({s['worst_case']}); losses: {', '.join(s['losses']) or 'none'}"
        )
    for host in hosts:
        print(f"host overhead {host['op']} {host['backend']} ({host['case']}): {host['us']:.1f} us")


if __name__ == "__main__":
    sys.exit(main())
