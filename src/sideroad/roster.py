"""Roster: the attached adapters of one model by name, and what is said about a name that is not among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sideroad.adapter import Adapter
from sideroad.errors import AdapterError, did_you_mean, raise_findings
from sideroad.route import Names, read_weights


@dataclass(frozen=True)
class Entry:
    """An attached adapter: its description (an Adapter without tensors) and the layers that hold its tensors."""

    description: Adapter
    targets: tuple[str, ...]
    paths: tuple[str, ...]


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
        return weights

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
        raise_findings(AdapterError, "rows()", [f"row {', '.join(at)}: {text}" for text, at in wrong.items()])
        return found
