"""Pieces of Markdown that all sections of the report are made of."""

from __future__ import annotations


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table and an empty one."""
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return [f"| {line} |" for line in lines] + [""]


def ratio_text(ratio: dict[str, float] | None) -> str:
    """A ratio with its interval, bold where it is a loss."""
    if ratio is None:
        return ""
    text = f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"**{text}**" if ratio["value"] < 1 else text
