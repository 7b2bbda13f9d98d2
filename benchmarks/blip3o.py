"""BLIP3-o's first stage at true width with random weights: a race with the reference.

Run: python benchmarks/blip3o.py [--size 4b] [--rounds 5] [--quick]

4 of the transformer's 24 blocks, 30 steps, 64 tokens, guidance 3, float32: one picture from its
condition on, then four pictures of one prompt, where 2 layers of the language model read it.
`--quick` takes the tiny model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.blip3o_models import Stage
from benchmarks.blip3o_race import race
from benchmarks.machine import ceilings, keep_freed_memory, write_result

BLOCKS, STEPS = 4, 30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="blip3o", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("4b", "8b", "tiny"), default="4b")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"default: {BLOCKS}")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--quick", action="store_true", help="the tiny model, few steps")
    parser.add_argument("--json", type=Path, help="result file; default: a dated one in results/")
    args = parser.parse_args(argv)
    size, steps = ("tiny", 3) if args.quick else (args.size, STEPS)
    keep_freed_memory()
    limits = ceilings(torch.device("cpu"), torch.float32, quick=args.quick)
    body = race(Stage.random(size, blocks=args.blocks), steps=steps, rounds=args.rounds)
    print(write_result("blip3o", {"size": size, "ceilings": limits, **body}, args.json))
    return 1 if body["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
