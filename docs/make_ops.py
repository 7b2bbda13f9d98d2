"""Write docs/ops.md from the ops' contracts; a test keeps the page up to date.

Run: python docs/make_ops.py
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from clipflow.ops import all_ops
from clipflow.registry import Op

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "ops.md"
INTRODUCTION = """# The fused ops

Made from the contracts in `clipflow/ops/` by `python docs/make_ops.py`; edit those.

Every op is a function of `clipflow.ops`. Its *reference* is plain PyTorch (`backend="eager"`) and
says what the op means; every other backend is tested against it, in float32, bfloat16 and float16,
with at most twice eager's own error against float64. `native` is compiled: C++ on a CPU, CUDA on a
GPU. `auto` takes the first backend, in the order given here, that can run the call; a backend named
by the caller never falls back.
"""


def main() -> None:
    PAGE.write_text(page())
    print(PAGE)


def page() -> str:
    ops = sorted(all_ops(), key=lambda op: op.name)
    index = [f"- [`{op.name}`](#{op.name}): {summary(op)}" for op in ops]
    return "\n".join([INTRODUCTION, *index, "", *map(section, ops)])


def summary(op: Op) -> str:
    return contract(op).splitlines()[0]


def contract(op: Op) -> str:
    """The docstring of the contract file: formula and source."""
    return inspect.getdoc(inspect.getmodule(op.public)) or ""


def section(op: Op) -> str:
    rest = "\n".join(contract(op).splitlines()[1:]).strip("\n")
    promise = (
        "the very bits of eager in float32"
        if op.exact
        else "error at most twice eager's against float64"
    )
    bits = "do not depend" if op.batch_invariant else "may depend"
    facts = [
        f"- Backends, in the order of `auto`: {', '.join(map(described(op), op.order))}.",
        f"- Gradients: {gradients(op)}.",
        f"- Precision: {promise}; a sample's bits {bits} on the batch and the threads.",
        f"- Bytes moved: {op.traffic}.",
    ]
    # Annotations are kept as text, and printed with quotation marks.
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", f"{op.name}{inspect.signature(op.public)}")
    text = textwrap.dedent(inspect.getdoc(op.public) or "")
    parts = [f"## {op.name}\n", summary(op) + "\n", rest + "\n" if rest else "", *facts]
    return "\n".join([*parts, "\n```text", *wrapped(signature), "", text, "```\n"])


def described(op: Op):
    """The name of a backend and what it is written in, by the files that are there."""
    files = {
        "C++": ROOT / "csrc" / "cpu" / f"{op.name}.cpp",
        "CUDA": ROOT / "csrc" / "cuda" / f"{op.name}.cu",
    }
    compiled = " and ".join(language for language, path in files.items() if path.is_file())

    def name(backend: str) -> str:
        if backend != "native":
            return f"`{backend}`"
        return f"`native` ({compiled or 'the compiled kernels of PyTorch'})"

    return name


def gradients(op: Op) -> str:
    if not op.differentiable:
        return "none"
    own = [f"`{name}`" for name in op.order if op.backends[name].backward is not None]
    return f"all backends; {' and '.join(own)} by formulas of their own" if own else "all backends"


def wrapped(signature: str) -> list[str]:
    return textwrap.wrap(signature, width=96, subsequent_indent="    ", break_long_words=False)


if __name__ == "__main__":
    main()
