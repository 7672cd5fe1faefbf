"""`sideroad models`: the named models, and what of them lies in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sideroad.cli import frame

if TYPE_CHECKING:
    from sideroad.base.catalog import NamedModel

SUMMARY = "List the models that have a name."
EXAMPLES = ("sideroad models", "sideroad models --fetch smollm2-135m-instruct")

Fetch = Annotated[
    str | None, typer.Option("--fetch", metavar="NAME", help="Download and prepare this model now, for use offline.")
]
Clear = Annotated[
    str | None,
    typer.Option("--clear", metavar="NAME", help="Remove this model from the cache; `all` removes every one."),
]


def run(
    fetch: Fetch = None,
    clear: Clear = None,
    offline: frame.Offline = False,
    as_json: frame.AsJson = False,
    debug: frame.Debug = False,
) -> None:
    """List the models that have a name: source, licence, size, and whether they are on this machine.

    Any hub id, local directory or .gguf file works as a base too.
    """
    from sideroad.base import cache
    from sideroad.cli import render
    from sideroad.cli.progress import Bar

    console = render.console(to_stderr=as_json)
    if clear is not None:
        freed = cache.clear(None if clear == "all" else clear)
        console.print(f"removed {clear}, {render.size(freed)} freed")
    if fetch is not None:
        with Bar(console) as bar:
            _fetch(fetch, bar, offline=offline)
    listed = _list()
    if as_json:
        render.write_json({"cache": str(cache.cache_dir()), **listed})
    elif fetch is None and clear is None:
        _print(listed, str(cache.cache_dir()))


def _fetch(name: str, bar: Any, *, offline: bool) -> None:
    from sideroad.base import CATALOG, BaseConfig, cached, load_tokenizer
    from sideroad.cli.progress import loading
    from sideroad.errors import BaseModelError, did_you_mean

    if name not in CATALOG:
        raise BaseModelError(
            f'no model is named "{name}".{did_you_mean(name, CATALOG)} Named models: {", ".join(CATALOG)}. '
            "Hub ids and directories need no --fetch; name them in a recipe."
        )
    load_tokenizer(BaseConfig(model=name), offline=offline, on_progress=loading(bar))
    bar.close()
    bar.say(f"{name} is in the cache at {cached(name)}")


def _list() -> dict[str, list[dict[str, Any]]]:
    from sideroad.base import CATALOG
    from sideroad.base.cache import entries

    others = [entry for entry in entries() if entry.name not in CATALOG]
    return {
        "models": [_describe(model) for model in CATALOG.values()],
        "other_entries": [{"name": entry.name, "path": str(entry.path), "bytes": entry.bytes} for entry in others],
    }


def _describe(model: NamedModel) -> dict[str, Any]:
    from sideroad.base import cached

    path = cached(model.name)
    return {
        "name": model.name,
        "display": model.display,
        "task": model.task,
        "parameters": model.parameters,
        "licence": model.licence,
        "source": model.source,
        "download_bytes": model.wheel_bytes,
        "sha256": model.weights_sha256,
        "cached": str(path) if path else None,
        "cached_bytes": sum(item.stat().st_size for item in path.iterdir()) if path else 0,
    }


def _print(listed: dict[str, list[dict[str, Any]]], cache: str) -> None:
    from sideroad.cli import render

    console = render.console()
    rows = [
        (
            model["name"],
            model["licence"],
            render.count(model["parameters"]),
            render.size(model["download_bytes"]),
            render.size(model["cached_bytes"]) if model["cached"] else "not cached",
        )
        for model in listed["models"]
    ]
    console.print(render.table(("name", "licence", "parameters", "download", "on disk"), rows, left=2))
    console.print()
    for model in listed["models"]:
        console.print(f"{model['name']} comes in the package {model['source']}", soft_wrap=True)
    console.print(f"cache: {cache}", soft_wrap=True)
    for entry in listed["other_entries"]:
        console.print(f"  also there: {entry['name']}, {render.size(entry['bytes'])}", soft_wrap=True)
