"""Time launch configurations of the Triton row kernels on this GPU, and write the fastest.

Run: python benchmarks/tune.py [--op adaln_norm] [--widths 192,1152] [--dtype bfloat16]

For each op, its forward and its backward, and each row length D, candidates of rows and warps are
timed in turn; the file kernels/triton/configs.json is written with the fastest of each for the
architecture of this GPU, all else in it unchanged. The number of rows timed (4,096) enters no key:
the configuration decides the order of a row's sums, which must not depend on the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import Call, interleaved
from clipflow.ops import all_ops
from clipflow.registry import Case, Op

WIDTHS = (192, 1152, 1792, 2240, 3072, 4096, 5120)
TOKENS = 4096
MOST_VALUES = 32  # of a row that one lane holds: more spill
LEAST_GAIN = 1.02  # a candidate within 2 % of the default is noise
ROW_OPS = (
    "adaln_norm", "gated_residual_norm", "sandwich_residual_norm", "adaln_norm_quant",
    "clip_normalize",
)  # fmt: skip

Config = tuple[int, int]  # rows, warps
Timer = Callable[[Mapping[Config, Call]], Mapping[Config, float]]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: needs a CUDA GPU, and there is none here", file=sys.stderr)
        return 2
    from clipflow.kernels.triton import _configs  # needs Triton

    device = torch.device("cuda", torch.cuda.current_device())
    arch = _configs.ARCHS[device.index]
    chosen = {}
    for op in all_ops():
        if op.name not in ROW_OPS or args.op not in (None, op.name):
            continue
        for D in args.widths:
            for name, call in calls_of(op, case_of(op, D), device, getattr(torch, args.dtype)):
                candidates = candidates_of(_configs.default(name, D), D)
                config = fastest(
                    candidates, partial(launched, (name, arch, D), call), cuda_timer(device)
                )
                chosen[name, arch, D] = config
                print(f"{name:<32}{arch:<8}D {D:<6}rows {config[0]:<3}warps {config[1]}")
    if not chosen:
        print(f"tune: --op must be one of {', '.join(ROW_OPS)}, got {args.op!r}", file=sys.stderr)
        return 2
    note = f"{arch} tuned on {torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    write(args.json or _configs.PATH, chosen, note)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="one op; default: all row kernels")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="row lengths D")
    parser.add_argument("--json", type=Path, help="file to change; default: the shipped one")
    args = parser.parse_args(argv)
    args.widths = [int(width) for width in args.widths.split(",")]
    return args


def case_of(op: Op, D: int) -> Case:
    """The op's first timed working point, widened to rows of D channels, at most TOKENS of them."""
    wide = op.timed[0]

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        B, _, C = wide.inputs(torch.device("meta"), dtype)[0].shape

        def resized(like: torch.Tensor) -> torch.Tensor:
            lengths = [D if n == C else n for n in like.shape]
            if like.ndim == 3:
                lengths[1] = TOKENS // B
            return torch.randn(lengths, device=device, dtype=dtype)

        return tuple(resized(like) for like in wide.inputs(torch.device("meta"), dtype))

    return dataclasses.replace(wide, name=f"D{D}", inputs=inputs)


def calls_of(
    op: Op, case: Case, device: torch.device, dtype: torch.dtype
) -> list[tuple[str, Call]]:
    """The op's forward and, where it has one, its backward, by the name that configures each."""
    inputs, options = case.inputs(device, dtype), case.options(device)
    public = partial(case.of(op.public), backend="triton", **options)
    calls: list[tuple[str, Call]] = [(op.name, lambda: public(*inputs))]
    if op.differentiable:
        leaves = [tensor.requires_grad_() for tensor in case.inputs(device, dtype)]
        out = public(*leaves)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        seeds = [torch.randn_like(y) for y in outs]
        backward = partial(torch.autograd.grad, outs, leaves, seeds, retain_graph=True)
        calls.append((f"{op.name}_backward", backward))
    return calls


def candidates_of(default: Config, D: int) -> list[Config]:
    """The default first, then every other one that gives each lane from 2 to MOST_VALUES values."""
    block = 1 << (D - 1).bit_length()
    configs = [(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8, 16, 32)]
    fit = [c for c in configs if 2 <= c[0] * block / (c[1] * 32) <= MOST_VALUES]
    return [default, *(c for c in fit if c != default)]


def fastest(
    candidates: Sequence[Config], call_with: Callable[[Config], object], timer: Timer
) -> Config:
    """The candidate that takes the least time; the first one, unless another clearly gains."""
    times = timer({config: partial(call_with, config) for config in candidates})
    best = min(times, key=times.__getitem__)
    return best if times[candidates[0]] > times[best] * LEAST_GAIN else candidates[0]


def launched(key: tuple[str, str, int], call: Call, config: Config) -> object:
    """The call, with its kernels launched as `config` says."""
    from clipflow.kernels.triton import _configs  # needs Triton

    with _configs.override(key, config):
        return call()


def cuda_timer(device: torch.device) -> Timer:
    def seconds(calls: Mapping[Config, Call]) -> dict[Config, float]:
        times = interleaved(calls, rounds=5, block_seconds=0.01, device=device)
        return {config: found.median for config, found in times.items()}

    return seconds


def write(path: Path, chosen: Mapping[tuple[str, str, int], Config], note: str) -> None:
    """Put `chosen` into the file, a line an op and architecture, and `note` after its own."""
    whole = json.loads(path.read_text()) if path.is_file() else {"note": "", "configs": {}}
    notes = [line for line in whole["note"].split("; ") if line and line != note]
    configs = whole["configs"]
    for (op, arch, D), (rows, warps) in chosen.items():
        configs.setdefault(op, {}).setdefault(arch, {})[str(D)] = {"rows": rows, "warps": warps}
    lines = [
        f"  {json.dumps(op)}: {{\n"
        + ",\n".join(f"   {json.dumps(arch)}: {json.dumps(of)}" for arch, of in archs.items())
        + "\n  }"
        for op, archs in configs.items()
    ]
    text = '{\n "note": ' + json.dumps("; ".join([*notes, note]))
    path.write_text(text + ',\n "configs": {\n' + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    sys.exit(main())
