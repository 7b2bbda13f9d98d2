"""Scores of the scenes as a table of text."""

from __future__ import annotations

from typing import Any

# (must, aim) of the embedded model; None: reported, without a bound.
_TARGETS: dict[tuple[str, str], tuple[float | None, float]] = {
    ("generation", "single_object"): (0.90, 0.99),
    ("generation", "colors"): (0.90, 0.99),
    ("generation", "counting"): (0.70, 0.95),
    ("generation", "two_object"): (0.65, 0.95),
    ("generation", "color_attr"): (0.55, 0.92),
    ("generation", "position"): (0.45, 0.92),
    ("generation", "background"): (0.90, 0.99),
    ("generation", "reasoning"): (None, 0.60),
    ("edits", "all"): (0.60, 0.90),
    ("questions", "all"): (0.93, 0.99),
    ("classification", "48 labels"): (0.97, 0.995),
    ("reconstruction", "PSNR dB"): (26.0, 32.0),
}

_HEADER = ("part", "kind", "score", "seen", "unseen", "count", "must", "aim")
_WIDTHS = (16, 15, 8, 8, 8, 8, 8, 8)


def format_table(result: dict[str, Any]) -> str:
    """The result of `evaluate` as lines of text: one row a tag or kind, "-" where nothing is.

    "unseen" counts the items with a pair of looks that training never shows together.
    """
    rows = [_HEADER]
    for part in ("generation", "edits", "questions"):
        for kind, score in result.get(part, {}).items():
            rows.append(_row(part, kind, score))
            rows += [_row(part, f"  {form}", own) for form, own in score.get("forms", {}).items()]
    if "classification" in result:
        rows.append(_row("classification", "48 labels", result["classification"]))
    if "reconstruction" in result:
        own = result["reconstruction"]
        rows.append(_row("reconstruction", "PSNR dB", {"score": own["psnr"]} | _count(own)))
        rows.append(_row("reconstruction", "SSIM", {"score": own["ssim"]} | _count(own)))
        rows.append(_row("reconstruction", "read back", own["read_back"]))
    lines = [_line(row) for row in rows]
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    if "skipped_steps" in result:
        lines.append(f"steps skipped in a picture: {result['skipped_steps']:.2f}")
    return "\n".join([*lines, f"{settings}; {result['seconds']} s"])


def _count(score: dict[str, Any]) -> dict[str, Any]:
    return {"count": score["count"]}


def _row(part: str, kind: str, score: dict[str, Any]) -> tuple[str, ...]:
    must, aim = _TARGETS.get((part, kind), (None, None))
    apart = [score.get(name, {}).get("score") for name in ("seen", "unseen")]
    return (
        part,
        kind,
        *(_number(value) for value in (score["score"], *apart)),
        str(score["count"]),
        _number(must),
        _number(aim),
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value > 1 else f"{value:.3f}"


def _line(row: tuple[str, ...]) -> str:
    cells = [
        f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(row, _WIDTHS, strict=True))
    ]
    return "".join(cells).rstrip()
