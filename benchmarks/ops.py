"""Time every registered op on every backend against eager PyTorch and torch.compile.

Run: python benchmarks/ops.py [--op adaln_norm] [--device cpu] [--dtype float32] [--quick]

On each case the results are compared with float64 first; a wrong backend is not timed and the run
fails. Contenders are then timed in turn, in one process, together with a plain copy of as many
bytes as the op must move. Ratios are paired by round, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import ceilings, facts, keep_freed_memory, write_result
from benchmarks.ratios import paired_ratio, summarize
from benchmarks.timing import Call, interleaved
from clipflow.ops import all_ops
from clipflow.registry import Case, Op, Output

PEERS = ("eager", "inductor")
Result = dict[str, object]


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    keep_freed_memory()
    machine = facts()
    print(f"{machine['cpu']}, {machine['threads']} threads, GPU {machine['gpu']}")
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, {args.rounds} rounds")
    limits = ceilings(device, dtype, quick=args.quick)
    print("copy {copy_gb_per_s:.1f} GB/s, GEMM {gemm_gflop_per_s:.0f} GFLOP/s".format(**limits))

    rows, wrong, hosts = [], [], []
    for op in all_ops():
        if args.op not in (None, op.name):
            continue
        for case in op.timed:
            found, failed = measure(op, case, device, dtype, args)
            rows += found
            wrong += failed
        hosts += host_overhead(op, device, dtype, args)
    if args.op is not None and not rows:
        print(f"ops: --op must name a registered op, got {args.op!r}", file=sys.stderr)
        return 2

    summaries = summaries_of(rows)
    print_summaries(summaries, hosts)
    for line in wrong:
        print(f"WRONG, not timed: {line}", file=sys.stderr)
    settings = {"device": args.device, "dtype": args.dtype, "rounds": args.rounds}
    body = {"settings": settings, "ceilings": limits, "rows": rows, "summaries": summaries}
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
    args.block = 0.01 if args.quick else 0.05
    return args


def measure(
    op: Op, case: Case, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> tuple[list[Result], list[str]]:
    """Rows of one case, one a contender, and a line for each contender with wrong results."""
    inputs = case.inputs(device, dtype)
    contenders: dict[str, Call] = {}
    errors, wrong = {}, []
    calls = candidates(op, case, inputs, compile_peer=not args.quick)
    measure_error = error_meter(op, case, inputs)
    for name, call in calls.items():
        errors[name], allowed = measure_error(call())
        if errors[name] <= allowed:
            contenders[name] = partial(call)
        else:
            wrong.append(f"{op.name} {case.name} {name}: {errors[name]:.2e} > {allowed:.2e}")
    moved = sum(t.nbytes for t in (*inputs, *tensors(contenders["eager"]())))
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    times = interleaved(
        {**contenders, "copy": lambda: target.copy_(source)},
        rounds=args.rounds,
        block_seconds=args.block,
        device=device,
    )
    rows = []
    for name in contenders:
        peers = [peer for peer in PEERS if peer in contenders and peer != name]
        ratios = {p: vars(paired_ratio(times[p].wall, times[name].wall)) for p in peers}
        # Wall time on a shared machine measures the neighbors too; processor time does not.
        cpu = {p: vars(paired_ratio(times[p].cpu, times[name].cpu)) for p in peers}
        rows.append(
            {
                "op": op.name, "case": case.name, "backend": name,
                "device": device.type, "dtype": args.dtype,
                "wall_us": times[name].median * 1e6, "cpu_us": times[name].median_cpu * 1e6,
                "gb_per_s": moved / times[name].median / 1e9,
                "share_of_copy": times["copy"].median / times[name].median,
                "error": errors[name], "times_faster_than": ratios, "times_less_cpu_than": cpu,
            }
        )  # fmt: skip
    print_rows(rows)
    return rows, wrong


def candidates(
    op: Op, case: Case, inputs: tuple[Tensor, ...], *, compile_peer: bool
) -> dict[str, Callable[[], Output]]:
    """Every willing backend of the op, by name, and the reference under torch.compile."""
    public, options = case.of(op.public), case.options(inputs[0].device)
    calls = {
        name: partial(public, *inputs, backend=name, **options)
        for name in op.backends
        if op.refusal(inputs[0], name) is None
    }
    if compile_peer:
        torch._dynamo.reset()  # each case at its best: static shapes, no recompile limit
        mode = "max-autotune-no-cudagraphs" if inputs[0].is_cuda else None
        compiled = torch.compile(public, fullgraph=True, dynamic=False, mode=mode)
        calls["inductor"] = partial(compiled, *inputs, backend="eager", **options)
    return calls


def tensors(output: Output) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def error_meter(
    op: Op, case: Case, inputs: tuple[Tensor, ...]
) -> Callable[[Output], tuple[float, float]]:
    """A function of an output: its largest error against float64, and what is allowed.

    Allowed is twice eager's own error, plus one ulp. Of several outputs, the one that is furthest
    from what it is allowed.
    """
    wide, options = tuple(t.double() for t in inputs), case.options(inputs[0].device)
    run_eager = partial(case.of(op.public), backend="eager", **options)
    exact = case.of(op.truth)(*wide, **options) if op.truth else run_eager(*wide)
    truth = tensors(op.decoded(exact))
    eager = tensors(op.decoded(run_eager(*inputs)))
    allowed = [
        2 * (e.double() - t).abs().max().item() + torch.finfo(e.dtype).eps * t.abs().max().item()
        for e, t in zip(eager, truth, strict=True)
    ]

    def meter(output: Output) -> tuple[float, float]:
        found = tensors(op.decoded(output))
        errors = [(y.double() - t).abs().max().item() for y, t in zip(found, truth, strict=True)]
        return max(zip(errors, allowed, strict=True), key=lambda pair: pair[0] - pair[1])

    return meter


def host_overhead(
    op: Op, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> list[Result]:
    """Microseconds that one call costs beyond an empty Python call, on the op's smallest case."""
    case = min(op.cases, key=lambda case: case.inputs(device, dtype)[0].numel())
    inputs = case.inputs(device, dtype)
    calls = candidates(op, case, inputs, compile_peer=False)
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
            if row["backend"] not in PEERS:
                key = (row["op"], row["backend"], peer)
                grouped.setdefault(key, {})[row["case"]] = ratio["value"]
    return [
        {"op": op, "backend": backend, "peer": peer, **vars(summarize(ratios))}
        for (op, backend, peer), ratios in grouped.items()
    ]


def print_rows(rows: list[Result]) -> None:
    for row in rows:
        text = f"{row['op']:<16}{row['case']:<40}{row['backend']:<10}{row['wall_us']:>11.1f} us"
        text += f"{row['cpu_us']:>11.1f} cpu us{row['gb_per_s']:>8.1f} GB/s"
        for peer, r in row["times_faster_than"].items():
            text += f"  {r['value']:.2f}x {peer} [{r['low']:.2f}, {r['high']:.2f}]"
        print(text, flush=True)


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
