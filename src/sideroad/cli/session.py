"""A base with its adapters, as `evaluate`, `generate` and `chat` use it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sideroad.cli.locate import adapter_dir
from sideroad.errors import AdapterError

if TYPE_CHECKING:
    from sideroad.adapter import Adapter
    from sideroad.attaching import Attached
    from sideroad.base import Base, BaseConfig
    from sideroad.cli.progress import Bar
    from sideroad.data.config import DataConfig


@dataclass(frozen=True)
class Session:
    """A loaded base; `adapters` are attached under their names, and `acting` says which one speaks.

    `manifest` is what `merge` wrote beside the base, where it did.
    """

    base: Base
    attached: Attached | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def acting(self, name: str | None) -> Iterator[None]:
        """Within this context the adapter `name` acts, with the chat template it was trained with; None: the base."""
        tokenizer = self.base.tokenizer
        own = tokenizer.chat_template
        tokenizer.chat_template = prompt_of(self._manifest(name)).get("chat_template") or own
        try:
            if self.attached is None:
                yield
            else:
                with self.attached.disabled() if name is None else self.attached.using(name):
                    yield
        finally:
            tokenizer.chat_template = own

    def prompt_config(self, name: str | None) -> DataConfig:
        """How prompts are written for the adapter `name`, or None for the base: with the system message of training."""
        from sideroad.data.config import DataConfig

        return DataConfig(train="none", system=prompt_of(self._manifest(name)).get("system"))

    def _manifest(self, name: str | None) -> Mapping[str, Any]:
        return self.manifest if name is None else self.adapters[name].manifest


def prompt_of(manifest: Mapping[str, Any]) -> Mapping[str, str]:
    """What a manifest says about prompts: `system` as in `DataConfig`, `chat_template` as Jinja text; what is set."""
    prompt = manifest.get("prompt")
    known = prompt if isinstance(prompt, dict) else {}
    return {key: known[key] for key in ("system", "chat_template") if isinstance(known.get(key), str)}


def open_session(
    places: Mapping[str, Path], model: str | None, *, device: str = "auto", offline: bool = False, bar: Bar
) -> Session:
    """Load adapters and the base they were made for.

    Args:
        places: name → run or adapter directory.
        model: base to use in place of the one the first adapter names; with no adapter it is needed.
    Raises:
        AdapterError: an adapter does not name its base, or was made for another base than the one loaded.
        BaseModelError: the base cannot be loaded.
    """
    directories = {name: adapter_dir(place) for name, place in places.items()}
    from sideroad.adapter import Adapter
    from sideroad.adapter_files import MANIFEST
    from sideroad.attaching import attach
    from sideroad.base import load_base
    from sideroad.cli.progress import loading
    from sideroad.files import read_json
    from sideroad.vocabulary import grow

    adapters = {name: Adapter.load(directory) for name, directory in directories.items()}
    named = (named_base(directories[name], adapter) for name, adapter in adapters.items())
    config = base_config(next(named, {}) if model is None else {"model": model}, device)
    base = load_base(config, offline=offline, on_progress=loading(bar))
    bar.close()
    handle = None
    for name, adapter in adapters.items():
        _check_base(name, adapter, base, forced=model is not None, bar=bar)
        grow(base.model, adapter)
        handle = attach(base.model, adapter, name, trainable=False)
    merged = Path(os.path.expanduser(config.model)) / MANIFEST
    return Session(base, handle, adapters, read_json(merged) if merged.is_file() else {})


def named_base(directory: Path, adapter: Adapter) -> dict[str, Any]:
    """The `base` section of the recipe behind an adapter, or just the name its files give; empty when there is none."""
    recipe = recipe_values(directory, adapter)
    if isinstance(recipe.get("base"), dict):
        return dict(recipe["base"])
    return {"model": adapter.base.name} if adapter.base is not None and adapter.base.name else {}


def recipe_values(directory: Path, adapter: Adapter) -> dict[str, Any]:
    """The recipe behind an adapter: its run's with this machine's paths, else the one it carries, else nothing."""
    from sideroad.train.recipe import load_recipe

    run = directory.resolve().parent / "recipe.yaml"
    if directory.resolve().name == "adapter" and run.is_file():
        return load_recipe(run).model_dump(mode="json")
    carried = adapter.manifest.get("recipe")
    return dict(carried) if isinstance(carried, dict) else {}


def base_config(section: Mapping[str, Any], device: str = "auto") -> BaseConfig:
    """Read a `base` section, with the device of the command line.

    Raises:
        AdapterError: it names no model.
        ConfigError: it is malformed, or there is no such device.
    """
    from sideroad.base import BaseConfig
    from sideroad.config import validate

    if not section.get("model"):
        raise AdapterError("which base model? The adapter does not name one; give --base MODEL.")
    return validate(BaseConfig, {**section, "device": device}, "base")


def _check_base(name: str, adapter: Adapter, base: Base, *, forced: bool, bar: Bar) -> None:
    record, identity = adapter.base, base.identity
    if record is None or record.sha256 is None or record.sha256 == identity.sha256:
        return
    what = (
        f'adapter "{name}" was made for {record.name} (sha256 {record.sha256[:12]}…), '
        f"not for {identity.name} (sha256 {identity.sha256[:12]}…)"
    )
    if not forced:
        raise AdapterError(f"{what}. Give --base MODEL to use another base on purpose.")
    bar.say(f"warning: {what}; its answers mean little there")
