"""`sideroad merge`: a base and its adapters become one plain model directory."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from sideroad.cli import frame

if TYPE_CHECKING:
    from sideroad.base import BaseConfig
    from sideroad.compose.merge import MergeDtype, MergeReport

SUMMARY = "Write a model with adapters merged in."
EXAMPLES = (
    "sideroad merge runs/quickstart/adapter --out merged",
    "sideroad merge runs/a runs/b --weights 0.5,0.5 --out merged --dtype bfloat16",
)

Adapters = Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Run or adapter directories of one base.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="New directory for the model.", show_default=False)]
Weights = Annotated[
    str | None, typer.Option("--weights", metavar="NUMBERS", help="One per adapter, separated by commas [all 1].")
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Type of the saved weights: auto (the base's own), float32, bfloat16, float16.")
]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Merge even if an adapter was made for other weights.")]


def run(
    adapters: Adapters,
    out: Out,
    weights: Weights = None,
    base: frame.BaseModel = None,
    dtype: Dtype = "auto",
    any_base: AnyBase = False,
    offline: frame.Offline = False,
    as_json: frame.AsJson = False,
    debug: frame.Debug = False,
) -> None:
    """Add adapters to their base's weights and save the result, which needs neither sideroad nor PEFT.

    Sums are taken in fp32 and rounded once; the base itself stays as it is.
    """
    from sideroad.cli import render
    from sideroad.cli.locate import adapter_dir
    from sideroad.cli.progress import Bar, loading

    directories = [adapter_dir(adapter) for adapter in adapters]
    numbers = _numbers(weights, len(directories))
    kind = _dtype(dtype)
    from sideroad.compose.merge import merge

    with Bar(render.console(to_stderr=True)) as bar:
        report = merge(
            directories if numbers is None else dict(zip(directories, numbers, strict=True)),
            out,
            base=_base(directories, base),
            dtype=kind,
            any_base=any_base,
            offline=offline,
            on_progress=loading(bar),
        )
    if as_json:
        render.write_json(report.to_json())
    else:
        _print(report)


def _numbers(weights: str | None, wanted: int) -> list[float] | None:
    from sideroad.errors import ConfigError

    if weights is None:
        return None
    try:
        numbers = [float(text) for text in weights.split(",")]
    except ValueError as error:
        raise ConfigError(f'--weights "{weights}" is not numbers with commas; such as --weights 0.5,0.5') from error
    if len(numbers) != wanted:
        raise ConfigError(f"--weights has {len(numbers)} numbers for {wanted} adapters; give one for each, in order.")
    return numbers


def _dtype(name: str) -> MergeDtype:
    from sideroad.compose.merge import MergeDtype
    from sideroad.errors import ConfigError, did_you_mean

    allowed: tuple[MergeDtype, ...] = get_args(MergeDtype)
    for known in allowed:
        if name == known:
            return known
    raise ConfigError(f'--dtype "{name}" is unknown.{did_you_mean(name, allowed)} Allowed: {", ".join(allowed)}.')


def _base(directories: Sequence[Path], model: str | None) -> BaseConfig | None:
    """The base given, else the one of the adapters' recipes where these agree, else None."""
    from sideroad.adapter import Adapter
    from sideroad.base import BaseConfig
    from sideroad.cli.session import named_base

    if model is not None:
        return BaseConfig(model=model)
    sections = [named_base(directory, Adapter.load(directory)) for directory in directories]
    named = {(section.get("model"), section.get("revision")) for section in sections}
    if len(named) != 1:
        return None
    name, revision = named.pop()
    return BaseConfig(model=name, revision=revision) if name else None


def _print(report: MergeReport) -> None:
    from sideroad.cli import render

    console = render.console()
    for one in report.adapters:
        console.print(f"{one.name}  weight {one.weight:g}, {one.modules} layers, {one.parameters:,} parameters")
    console.print(f"into {report.base.name}, {report.modules} layers changed, saved in {report.dtype}", soft_wrap=True)
    if report.rounding is not None:
        console.print(f"rounding took at most {100 * report.rounding:.2g} % of a layer's change")
    if report.untied:
        console.print(f"no longer tied to the embedding: {', '.join(report.untied)}", soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"{report.path}  {render.size(sum(report.files.values()))}", soft_wrap=True)
    console.print(f'\ntry next:\n  sideroad generate --base {shlex.quote(report.path)} "…"', soft_wrap=True)
