"""`sideroad inspect`: what an adapter directory holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sideroad.cli import frame

if TYPE_CHECKING:
    from rich.console import Console

    from sideroad.analyze.inspect import AdapterReport

SUMMARY = "Show what is inside an adapter."
EXAMPLES = ("sideroad inspect runs/quickstart/adapter", "sideroad inspect some/peft/adapter --json")

Place = Annotated[Path, typer.Argument(metavar="ADAPTER", help="A run or adapter directory; PEFT's own work too.")]
All = Annotated[bool, typer.Option("--all", help="List every module.")]


def run(
    adapter: Place, all_modules: All = False, as_json: frame.AsJson = False, debug: frame.Debug = False
) -> None:
    """Show an adapter's files, base, configuration, counts, ranks and norms.

    Norms are Frobenius norms of the whole update s·B·A; the effective rank says how many directions it really uses.
    """
    from sideroad.cli import render
    from sideroad.cli.locate import adapter_dir

    directory = adapter_dir(adapter)
    from sideroad.analyze.inspect import inspect_adapter

    report = inspect_adapter(directory)
    if as_json:
        render.write_json(report.to_json())
    else:
        _print(render.console(), report, all_modules)


def _print(console: Console, report: AdapterReport, all_modules: bool) -> None:
    from sideroad.cli import render

    _print_facts(console, report)
    rows = [
        (
            group.leaf,
            str(group.modules),
            _range(group.rank_min, group.rank_max),
            f"{group.parameters:,}",
            f"{group.norm:.4g}",
            f"{group.norm_max:.4g}",
            f"{group.effective_rank:.2f}",
        )
        for group in report.groups
    ]
    columns = ("layer", "count", "rank", "parameters", "mean norm", "max norm", "effective rank")
    console.print()
    console.print(render.table(columns, rows))
    if all_modules:
        every = [
            (module.path, str(module.rank), f"{module.scale:g}", f"{module.norm:.4g}", f"{module.effective_rank:.2f}")
            for module in report.modules
        ]
        console.print()
        console.print(render.table(("module", "rank", "scale", "norm", "effective rank"), every))
    for path, norm in report.biases.items():
        console.print(f"{path}.bias  norm {norm:.4g}", soft_wrap=True)
    for path, count in report.rows.items():
        console.print(f"{path}  {count} trained rows", soft_wrap=True)
    for path, count in report.whole.items():
        console.print(f"{path}  trained whole, {count:,} values", soft_wrap=True)


def _print_facts(console: Console, report: AdapterReport) -> None:
    from sideroad.cli import render
    from sideroad.cli.described import method_line, ranks_line
    from sideroad.config import SUBTRACTED, init_name

    base, ranks = report.base, report.ranks
    sha256 = f"sha256 {base.sha256[:12]}…" if base and base.sha256 else None
    named = [base.name, base.source, sha256, base.licence] if base else []
    files = ", ".join(f"{file.name} ({render.size(file.bytes)})" for file in report.files)
    dtypes = ", ".join(report.dtypes)
    facts = {
        "adapter": report.path,
        "files": files,
        "base": ", ".join(item for item in dict.fromkeys(named) if item) or "not named",
        "method": method_line(report.config.method),
        "parameters": f"{report.parameters:,} in {len(report.modules)} modules, {dtypes}",
    }
    if ranks is not None and ranks.smallest < ranks.largest:
        facts["ranks"] = ranks_line(ranks)
    folded = [module.file_rank for module in report.modules if module.file_rank != module.rank]
    if folded:
        started = init_name(report.config.method.init) in SUBTRACTED
        what = "what was trained and the start that is subtracted" if started else "the pairs of all slices"
        facts["folded"] = f"pairs of rank {_range(min(folded), max(folded))} in the file hold {what}"
    magnitudes = [module.magnitude for module in report.modules if module.magnitude is not None]
    if magnitudes:
        low, high = min(one.smallest for one in magnitudes), max(one.largest for one in magnitudes)
        count = sum(one.values for one in magnitudes)
        facts["magnitudes"] = f"{count:,} values, {low:.4g} to {high:.4g}; norms and ranks are those of the pairs alone"
    if report.foreign:
        facts["others' keys"] = ", ".join(report.foreign)
    for name, text in facts.items():
        console.print(f"{name:<13}{render.visible(text)}", soft_wrap=True)


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
