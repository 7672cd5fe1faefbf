"""Base against adapted, as a table and samples side by side, and as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sideroad.cli import render

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from sideroad.train.evaluation import Comparison

SIDE_BY_SIDE_WIDTH = 100


def plain(comparison: Comparison) -> dict[str, Any]:
    """The scores of both, and the samples, for JSON."""
    pairs = zip(comparison.base.samples, comparison.adapted.samples, strict=True)
    return {
        "base": comparison.base.to_json(),
        "adapted": comparison.adapted.to_json(),
        "samples": [
            {
                "source": base.source,
                "prompt": base.prompt,
                "reference": base.reference,
                "base": base.output,
                "adapted": adapted.output,
            }
            for base, adapted in pairs
        ],
    }


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the scores, then the samples."""
    print_scores(console, comparison.base.values, comparison.adapted.values)
    adapted = comparison.adapted
    if adapted.answered or adapted.left_out:
        left_out = f", {adapted.left_out} left out" if adapted.left_out else ""
        console.print(f"over {adapted.answered} answers{left_out}; loss over {adapted.tokens:,} tokens")
    pairs = zip(comparison.base.samples, adapted.samples, strict=True)
    print_samples(console, [(one.prompt, one.reference, one.output, two.output) for one, two in pairs])


def print_scores(console: Console, base: Mapping[str, float], adapted: Mapping[str, float]) -> None:
    """Print one row per metric; nothing when there is none."""
    from sideroad.train.report import label, shown

    names = dict.fromkeys([*base, *adapted])
    rows = [(label(name), shown(name, base.get(name)), shown(name, adapted.get(name))) for name in names]
    if rows:
        console.print(render.table(("on the validation set", "base", "adapted"), rows))


def print_samples(console: Console, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Print (prompt, reference, base, adapted): in columns, or one below the other in a narrow terminal."""
    if not rows:
        return
    columns = ("prompt", "reference", "base", "adapted")
    console.print()
    if console.width >= SIDE_BY_SIDE_WIDTH:
        console.print(render.side_by_side(columns, rows))
        return
    for row in rows:
        for name, text in zip(columns, row, strict=True):
            console.print(f"{name:<10}{render.visible(text)}", soft_wrap=True)
        console.print()
