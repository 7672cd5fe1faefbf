"""`sideroad targets`: what a choice of layers adapts, and what that costs, from the model's configuration alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sideroad.cli import frame

if TYPE_CHECKING:
    from torch import nn

    from sideroad.cli.settings import Adapted
    from sideroad.config import AdapterConfig
    from sideroad.targets import Target

SUMMARY = "Show which layers a choice adapts, with counts."
EXAMPLES = (
    "sideroad targets smollm2-135m-instruct",
    "sideroad targets smollm2-135m-instruct --targets q_proj,v_proj --layers 0-9 --rank 16",
    "sideroad targets --recipe examples/quickstart.yaml --all",
)

Model = Annotated[
    str | None, typer.Argument(help="A named model, a hub id, a directory or a .gguf file; or give --recipe.")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="Take base and adapter from this recipe.")
]
Names = Annotated[
    list[str] | None,
    typer.Option("--targets", metavar="PATTERNS", help="Names, globs or re:…, separated by commas [all-linear]."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="PATTERNS", help="Layers to leave alone, same patterns.")
]
Layers = Annotated[str | None, typer.Option("--layers", metavar="RANGES", help="Blocks, such as 0-3,10-.")]
Rank = Annotated[int | None, typer.Option("--rank", help="Rank of every pair.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other key, such as adapter.bias=adapted; repeatable."),
]
All = Annotated[bool, typer.Option("--all", help="List every path.")]


def run(
    model: Model = None,
    recipe: RecipeFile = None,
    targets: Names = None,
    exclude: Exclude = None,
    layers: Layers = None,
    rank: Rank = None,
    set_: Set = None,
    all_paths: All = False,
    offline: frame.Offline = False,
    as_json: frame.AsJson = False,
    debug: frame.Debug = False,
) -> None:
    """Show which layers a choice adapts, with shapes, ranks and counts; no weights are needed."""
    from sideroad.base import load_meta
    from sideroad.cli import render
    from sideroad.errors import ConfigError
    from sideroad.train.recipe import load_recipe

    if (model is None) == (recipe is None):
        raise ConfigError("give either a MODEL or --recipe FILE")
    written = load_recipe(recipe).model_dump(mode="json") if recipe else {"base": {"model": model}, "adapter": {}}
    start = {name: written[name] for name in ("base", "adapter")}
    options = {"targets": _split(targets), "exclude": _split(exclude), "layers": layers, "method.rank": rank}
    given = [(f"adapter.{key}", value) for key, value in options.items() if value is not None]
    chosen = _configure(start, given, set_ or ())
    survey = _survey(load_meta(chosen.base, offline=offline), chosen.adapter, chosen.base.model)
    if as_json:
        render.write_json(survey)
    else:
        _print(survey, all_paths)


def _split(patterns: Sequence[str] | None) -> list[str] | None:
    """Commas separate names and globs; a regular expression keeps its commas."""
    if patterns is None:
        return None
    return [name for item in patterns for name in ([item] if item.startswith("re:") else item.split(",")) if name]


def _configure(start: dict[str, Any], options: list[tuple[str, Any]], overrides: Sequence[str]) -> Adapted:
    from sideroad.cli.settings import Adapted, change
    from sideroad.config import validate

    return validate(Adapted, change(start, options, overrides), "the command line")


def _survey(model: nn.Module, config: AdapterConfig, name: str) -> dict[str, Any]:
    from sideroad.errors import TargetError, raise_findings
    from sideroad.methods.objections import objections
    from sideroad.mixtures import mixture_notes
    from sideroad.survey import Survey
    from sideroad.targets import count_values, resolve

    survey = Survey(model)
    targets = resolve(survey, config)
    raise_findings(TargetError, "the method does not fit these layers", objections(config, targets, survey.modules))
    counts = {path: count_values(target, config) for path, target in targets.items()}
    biased = survey.biases(config, targets)
    rows = {path: len(ids) for path, ids in survey.rows(config, []).items()}
    whole = {
        path: sum(one.numel() for one in survey.modules[path].parameters()) for path in survey.whole(config, [])
    }  # fmt: skip
    extra = sum(count * model.get_parameter(f"{path}.weight").shape[1] for path, count in rows.items())
    biases = sum(model.get_parameter(f"{path}.bias").numel() for path in biased)
    groups: dict[tuple[str, int, int, int, float, int | None], list[Target]] = defaultdict(list)
    for target in targets.values():
        leaf = ".".join(target.path.split(".")[-2 if target.experts else -1 :])
        shape = (target.out_features, target.in_features)
        groups[leaf, *shape, target.rank, target.alpha, target.experts].append(target)
    beside = biases + extra + sum(whole.values())
    trainable = sum(one.trained for one in counts.values()) + beside
    stored, wide = sum(one.stored for one in counts.values()) + beside, sum(one.wide for one in counts.values())
    base = sum(one.numel() for one in model.parameters())
    return {
        "model": name,
        "architecture": type(model).__name__,
        "base_parameters": base,
        "trainable_parameters": trainable,
        "stored_parameters": stored,
        "total_parameters": base + trainable,
        "trainable_percent": 100 * trainable / (base + trainable),
        "bias_parameters": biases,
        "file_bytes": {"float32": 4 * stored, "bfloat16": 2 * (stored + wide)},
        "groups": [
            {
                "name": leaf,
                "layers": len(group),
                "out_features": out_features,
                "in_features": in_features,
                "rank": rank,
                "alpha": alpha,
                "experts": experts,
                "parameters": sum(counts[target.path].trained for target in group),
                "stored": sum(counts[target.path].stored for target in group),
            }
            for (leaf, out_features, in_features, rank, alpha, experts), group in groups.items()
        ],
        "paths": [{"path": target.path, "rank": target.rank} for target in targets.values()],
        "bias_paths": list(biased),
        "rows": rows,
        "whole": whole,
        "notes": [*mixture_notes(survey, config, targets).lines, *_dealing(config)],
    }


def _dealing(config: AdapterConfig) -> list[str]:
    """What is said where ranks are settled later than here."""
    from sideroad.config import init_name

    method = config.method
    if method.kind == "adalora":
        return [
            f"AdaLoRA deals ranks while it trains, {method.target_rank} of {method.rank} to a layer on average: the "
            "size of the file is about right"
        ]
    if init_name(method.init) == "eva":
        return ["init: eva deals ranks when training starts, their sum staying the same: counts are about right"]
    return []


def _print(survey: dict[str, Any], all_paths: bool) -> None:
    from sideroad.cli import render

    console = render.console()
    rows = [
        (
            group["name"],
            str(group["layers"]),
            f"{group['experts']} x " * bool(group["experts"]) + f"{group['out_features']} x {group['in_features']}",
            str(group["rank"]),
            f"{group['alpha']:g}",
            f"{group['parameters']:,}",
        )
        for group in survey["groups"]
    ]
    columns = ("layer", "count", "out x in", "rank", "alpha", "parameters")
    base = render.count(survey["base_parameters"])
    console.print(f"{survey['model']} ({survey['architecture']}, {base} parameters)\n", soft_wrap=True)
    console.print(render.table(columns, rows))
    trainable, total, file_bytes = survey["trainable_parameters"], survey["total_parameters"], survey["file_bytes"]
    biases = f", {survey['bias_parameters']:,} of them biases" if survey["bias_parameters"] else ""
    console.print(
        f"\n{len(survey['paths'])} layers, {trainable:,} trainable parameters{biases}: "
        f"{render.share(trainable, total)} of {total:,}, base and adapter"
    )
    sizes = ", ".join(f"{render.size(number)} in {name}" for name, number in file_bytes.items())
    stored = survey["stored_parameters"]
    console.print(f"adapter file {sizes}" + (f" ({stored:,} values)" if stored != trainable else ""))
    for note in survey["notes"]:
        console.print(note, soft_wrap=True)
    for path, count in survey["rows"].items():
        console.print(f"{path}: {count} rows", soft_wrap=True)
    for path, count in survey["whole"].items():
        console.print(f"{path}: whole, {count:,} parameters", soft_wrap=True)
    if all_paths:
        for entry in survey["paths"]:
            console.print(f"{entry['path']}  rank {entry['rank']}", soft_wrap=True)
        for path in survey["bias_paths"]:
            console.print(f"{path}.bias", soft_wrap=True)
