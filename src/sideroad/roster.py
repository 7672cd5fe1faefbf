"""Roster: the attached adapters of one model by name, and what is said about a name that is not among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sideroad.adapter import Adapter
from sideroad.config import LoraMethod
from sideroad.errors import AdapterError, did_you_mean, raise_findings
from sideroad.route import Names, read_weights


@dataclass(frozen=True)
class Entry:
    """An attached adapter: its description (an Adapter without tensors) and where its tensors are.

    Args:
        targets: paths of the layers that have a pair.
        layers: paths of all layers that have tensors, those with a bias or rows alone included.
        modules: paths of modules trained whole.
        ties: path of a layer that follows another → path of that one.
    """

    description: Adapter
    targets: tuple[str, ...]
    layers: tuple[str, ...]
    modules: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of everything that has tensors."""
        return (*self.layers, *self.modules)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Paths of the modules in whose place a copy acts, followers included."""
        return (*self.modules, *(path for path, leader in self.ties.items() if leader in self.modules))

    @property
    def places(self) -> tuple[str, ...]:
        """Paths of everything that a delta sits on."""
        return tuple(dict.fromkeys((*self.paths, *self.ties)))


class Roster:
    """Name → Entry, in the order the adapters came."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def find(self, name: str) -> Entry:
        """Return the entry of that name.

        Raises:
            AdapterError: an unknown name.
        """
        if name not in self.entries:
            guess = did_you_mean(name, self.entries)
            raise AdapterError(f'no adapter is named "{name}". Attached: {self.listed()}.{guess}')
        return self.entries[name]

    def listed(self) -> str:
        """Return all names for a message."""
        return ", ".join(self.entries) or "none"

    def refuse_new(self, name: str) -> None:
        """Raise AdapterError if no adapter can get this name: it is empty, or taken."""
        if not name:
            raise AdapterError("an adapter's name cannot be empty; give any text.")
        if name in self.entries:
            raise AdapterError(
                f'an adapter named "{name}" is attached already; detach("{name}"), load into it, or take another name.'
            )

    def described(self, name: str, value: Adapter) -> Adapter:
        """Return what describes an adapter once a value is loaded into it: which factors learn stays as it was.

        Raises:
            AdapterError: the value is of another method than the adapter's deltas.
        """
        mine, theirs = self.find(name).description.config.method, value.config.method
        if mine.kind != theirs.kind:
            raise AdapterError(
                f'adapter "{name}" is {mine.kind}, and what is loaded into it is {theirs.kind}; attach it anew.'
            )
        if isinstance(mine, LoraMethod):
            theirs = theirs.model_copy(update={"trains": mine.trains})
        config = value.config.model_copy(update={"method": theirs})
        return replace(value, config=config, weights={}, modules={})

    def weights(self, names: Names) -> dict[str, float]:
        """Return name → weight for any way of naming adapters.

        Raises:
            AdapterError: an unknown name, or a weight that is not finite.
        """
        weights = read_weights(names)
        for name, weight in weights.items():
            self.find(name)
            if not math.isfinite(weight):
                raise AdapterError(f'the weight of adapter "{name}" is {weight}; it must be a finite number.')
        raise_findings(
            AdapterError, "these adapters cannot act together", [*self._clashes(weights), *self._several_norms(weights)]
        )
        # one that scales its layer's own output acts before those that add to it
        return dict(sorted(weights.items(), key=lambda item: not self._scales(item[0])))

    def _scales(self, name: str) -> bool:
        return self.entries[name].description.config.method.kind == "dora"

    def _several_norms(self, weights: Mapping[str, float]) -> list[str]:
        """Findings about DoRA adapters on one layer: each would have to scale what is left of the other's weight."""
        scaling = [name for name in weights if self._scales(name)]
        findings = []
        for index, name in enumerate(scaling):
            for other in scaling[:index]:
                met = set(self.entries[name].targets) & set(self.entries[other].targets)
                if met:
                    findings.append(
                        f'"{other}" and "{name}" are both DoRA adapters of {min(met)}, and a layer has one magnitude; '
                        "let one act at a time, or make one a part of the base with merge_and_unload()."
                    )
        return findings

    def _clashes(self, weights: Mapping[str, float]) -> list[str]:
        """Findings about modules trained whole: they act with weight 1, and nothing else acts on or inside them."""
        findings = []
        for name, weight in weights.items():
            entry = self.entries[name]
            if entry.modules and weight != 1.0:
                findings.append(
                    f'the weight of adapter "{name}" is {weight:g}, but it replaces {", ".join(entry.modules)} '
                    "(modules_to_save), which is there or not; give it weight 1."
                )
            for other in weights:
                met = [
                    (path, place)
                    for path in entry.replaced
                    for place in self.entries[other].places
                    if other != name and (place == path or place.startswith(f"{path}."))
                ]
                if met:
                    findings.append(
                        f'adapter "{name}" replaces {met[0][0]} (modules_to_save), and "{other}" changes {met[0][1]}; '
                        "only one of them can act at a time."
                    )
        return findings

    def row_weights(self, names: Sequence[Names | None]) -> list[dict[str, float]]:
        """Return name → weight for each row; nothing for None.

        Raises:
            AdapterError: not a list with one entry a row, or an entry that `weights` refuses; all are listed.
        """
        if isinstance(names, str | Mapping):
            raise AdapterError(
                f"rows() takes a list with one entry for each row of the batch, found {names!r}; "
                "using() lets one choice act on all rows."
            )
        found: list[dict[str, float]] = []
        wrong: dict[str, list[str]] = {}
        for row, choice in enumerate(names):
            try:
                found.append({} if choice is None else self.weights(choice))
            except AdapterError as error:
                wrong.setdefault(str(error), []).append(str(row))
        findings = [f"row {', '.join(at)}: {text}" for text, at in wrong.items()] or self._inside(found)
        raise_findings(AdapterError, "rows()", findings)
        return found

    def _inside(self, rows: Sequence[Mapping[str, float]]) -> list[str]:
        """Findings about adapters that act inside a module of which another one of the batch has a copy."""
        names = dict.fromkeys(name for weights in rows for name in weights)
        met = [
            (name, path, other, place)
            for name in names
            for path in self.entries[name].replaced
            for other in names
            for place in self.entries[other].places
            if place.startswith(f"{path}.")
        ]
        return [
            f'"{name}" replaces {path} (modules_to_save), and "{other}" acts inside it ({place}); their rows cannot be '
            "in one batch."
            for name, path, other, place in met[:1]
        ]
