"""Attached: the one handle of a model with adapters, which says which of them act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sideroad.adapter import Adapter
from sideroad.errors import AdapterError, MergeError
from sideroad.fitting import compare_layouts, layout_of, refuse_occupied
from sideroad.hold import let_go, take_hold
from sideroad.interrupts import uninterrupted
from sideroad.joining import Placed, join, make_deltas, part, state_of
from sideroad.kinds.experts import holder_of, layer_at
from sideroad.merging import Merged, base_instead, gather_parts, merge_into, restore
from sideroad.methods import parameters_of, tune_delta
from sideroad.roster import Entry, Roster
from sideroad.route import Names, Route, by_key, escape, find_delta, unescape
from sideroad.rows import Plan, refuse_sequence_first
from sideroad.survey import Survey
from sideroad.targets import named_exactly
from sideroad.tying import held_state, on_cpu


class Attached:
    """The adapters of one model: which there are, which act, which are trained, and the way into weights and back.

    Active and trainable are separate: no switch changes a `requires_grad`. With gradient checkpointing, run `backward`
    inside the same `using`, `rows` or `disabled` block as the forward: it computes activations again.

    Which adapters act is one state of the model: every thread's forward sees it. While one thread is inside a block,
    others may run the model (with the block's choice) but cannot switch it. Do not `await` inside a block. Use
    `attach` to make a handle.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._route = Route()
        self._roster = Roster()
        self._flags: dict[str, bool] = {}
        self._merged: Merged | None = None
        self._survey: Survey | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads its own model; one made while merged weights are put aside has the base's, as nothing merged."""
        aside = self._merged is not None and self._merged.aside is not None
        return {**self.__dict__, "_survey": None, "_merged": None if aside else self._merged}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the attached adapters, in the order they came."""
        return tuple(self._roster.entries)

    @property
    def active(self) -> Mapping[str, float]:
        """Adapters that shape the model's output now, each with its weight: merged, or added in the forward.

        Empty inside a `rows` block, where no adapter stands for all rows: see `by_row`.
        """
        now = self._route.live
        if self._merged is not None:
            now = {} if self._merged.aside is not None else self._merged.weights
        return {unescape(key): weight for key, weight in now.items()}

    @property
    def by_row(self) -> tuple[Mapping[str, float], ...]:
        """Adapters that shape each row of a batch, inside a `rows` block; empty elsewhere."""
        rows = self._route.plan.rows if self._route.plan else ()
        return tuple({unescape(key): weight for key, weight in weights.items()} for weights in rows)

    @property
    def merged_names(self) -> tuple[str, ...]:
        """Adapters that are merged into the weights at present."""
        return tuple(unescape(key) for key in self._merged.weights) if self._merged else ()

    @property
    def untied(self) -> tuple[str, ...]:
        """Paths of layers whose weight a merge has parted from the embedding it was tied to."""
        return tuple(self._merged.untied.ties) if self._merged else ()

    def paths(self, name: str) -> tuple[str, ...]:
        """Return the module paths that an adapter has tensors on, in model order."""
        return self._roster.find(name).paths

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return an adapter's live parameters by `<module path>.A`, `.bias`, `.rows` … or a module's own names."""
        found = ((path, parameters_of(delta)) for path, delta in self.deltas(name).items())
        return {f"{path}.{part}": one for path, parts in found for part, one in parts.items()}

    def deltas(self, name: str) -> dict[str, nn.Module]:
        """Return what an adapter has put on each layer, by path."""
        return {path: find_delta(self.model, path, name) for path in self._roster.find(name).paths}

    def adapter(self, name: str) -> Adapter:
        """Return an adapter as a value: CPU copies of its tensors, its targets as the shortest list of names."""
        entry = self._roster.find(name)
        held = on_cpu(self.state(name))
        config = named_exactly(self.survey(), entry.description.config, held.targets)
        kinds = {**entry.description.kinds, **self.survey().kind_names(held.targets)}
        return replace(entry.description, config=config, weights=held.tensors, modules=held.modules, kinds=kinds)

    def state(self, name: str) -> Placed:
        """Return an adapter's live tensors, detached, as its files hold them."""
        return held_state(self.model, self._roster.find(name), name)

    def load(self, name: str, value: Adapter) -> None:
        """Overwrite an attached adapter's tensors and settings in place; `requires_grad` stays as it is.

        Raises:
            AdapterError: another method, set of tensors or shapes; all are listed and nothing is changed.
            MergeError: the adapter is merged.
        """
        entry = self._roster.find(name)
        if name in self.merged_names:
            raise MergeError(f'adapter "{name}" is merged; unmerge() before loading into it.')
        described = self._roster.described(name, value)
        present = state_of(self.model, entry.paths, name)
        placed = compare_layouts(self.survey(), value, name, layout_of(present))
        with torch.no_grad(), uninterrupted():
            for path, parts in present.items():
                for leaf, tensor in parts.items():
                    tensor.copy_(placed[path][leaf])
                tune_delta(find_delta(self.model, path, name), value.config, path, layer_at(self.model, path))
            self._roster.entries[name] = replace(entry, description=described)

    def set_trainable(self, names: str | Sequence[str]) -> None:
        """Make exactly these adapters require gradients; an empty sequence freezes them all."""
        wanted = self._roster.weights(names)
        for name in self.names:
            for parameter in self.parameters(name).values():
                parameter.requires_grad_(name in wanted)

    def activate(self, names: Names) -> None:
        """Choose, in place, which adapters act and with which weights; an empty sequence means the base.

        Raises:
            AdapterError: an unknown name.
            MergeError: adapters are merged.
        """
        self._refuse_merged("activate()")
        self._route.switch(self._roster.weights(names))

    @contextmanager
    def using(self, names: Names) -> Iterator[Attached]:
        """Let other adapters act inside a `with` block; afterwards everything is as it was, whatever happened inside.

        Raises:
            AdapterError: an unknown name.
            MergeError: adapters are merged.
        """
        self._refuse_merged("using()")
        weights = self._roster.weights(names)
        with self._route.kept():
            self._route.switch(weights)
            yield self

    @contextmanager
    def rows(self, names: Sequence[Names | None], copies: int = 1) -> Iterator[Attached]:
        """Compute each row of a batch with adapters of its own inside a `with` block; None means the base.

        Row i of every adapted layer's input gets what is named for it, in training too. Rows are told apart by dim 0
        alone: it must be the batch, and a layer that sees something else of the same size (as many tokens as there are
        rows, sent to an expert) cannot be noticed. Rows are grouped by choice; the cost is that of the groups.
        The latest choice counts: `using`, `disabled`, `activate` or another `rows` inside the block replace this one,
        for the whole batch, until they end.

        Args:
            names: one entry for each row, as in `activate`, or None.
            copies: layers may also see each row this many times in succession, as `generate` repeats them for
                `num_beams` or `num_return_sequences` (an encoder sees them once, the decoder repeated).
        Raises:
            AdapterError: an unknown name, an empty list, inside a `disabled` block; from the model's forward: a layer
                sees another number of rows.
            MergeError: adapters are merged.
        """
        self._refuse_merged("rows()")
        refuse_sequence_first(self.survey().modules)
        plan = Plan([by_key(weights) for weights in self._roster.row_weights(names)], copies)
        with self._route.kept():
            self._route.switch_rows(plan)
            yield self

    @contextmanager
    def disabled(self) -> Iterator[Attached]:
        """Give the base inside a `with` block, bit for bit; merged weights are swapped out and in again.

        Raises:
            MergeError: adapters are merged and the base's bytes were not kept.
        """
        with self._route.kept(), base_instead(self.model, self._merged):
            self._route.silence()
            yield self

    @contextmanager
    def merged(self, names: Names | None = None) -> Iterator[Attached]:
        """Merge inside a `with` block and give the base's bytes back afterwards; arguments as in `merge`."""
        already = self._merged is not None
        try:
            self._merge(names, keep_base=True)
            yield self
        finally:
            if not already and self._merged is not None:
                self._unmerge()

    def merge(self, names: Names | None = None, keep_base: bool = True) -> None:
        """Write adapters into the base's weights; nothing is added in the forward then.

        The sum is taken in fp32 and rounded once. A weight tied to an embedding gets its own copy (see `untied`).
        Merging the same set again does nothing.

        Args:
            names: as in `activate`; None means those that are active.
            keep_base: keep a CPU copy of each changed weight, without which the merge cannot be undone.
        Raises:
            MergeError: another set is merged, a weight is shared with another layer, or a result is not finite.
            AdapterError: nothing to merge, or inside a `using`, `rows` or `disabled` block.
        """
        self._refuse_inside("merge()")
        self._merge(names, keep_base=keep_base)

    def unmerge(self) -> None:
        """Write the base's kept bytes back, tie again what was tied, and let the former adapters act as before.

        Raises:
            MergeError: nothing is merged, or the base was not kept.
            AdapterError: inside a `using`, `rows` or `disabled` block.
        """
        self._refuse_inside("unmerge()")
        if self._merged is None:
            raise MergeError("nothing is merged, so there is nothing to undo.")
        self._unmerge()

    def merge_and_unload(self) -> nn.Module:
        """Merge what is active (or keep what is merged), remove all adapters for good, and return the plain model.

        Raises:
            MergeError: as in `merge`.
            AdapterError: nothing is active.
        """
        self._refuse_inside("merge_and_unload()")
        with uninterrupted():
            if self._merged is None:
                self._merge(None, keep_base=False)
            # a handle that is let go keeps its record of what was untied
            for name in self.names:
                self._remove(name)
        return self.model

    def detach(self, name: str | None = None) -> None:
        """Remove one adapter, or all; with the last one the model is exactly what it was before the first.

        Raises:
            AdapterError: an unknown name, or inside a `using`, `rows` or `disabled` block.
            MergeError: adapters are merged.
        """
        self._refuse_inside("detach()")
        self._refuse_merged("detach()")
        for one in (names := self.names if name is None else (name,)):
            self._roster.find(one)
        with uninterrupted():
            for one in names:
                self._remove(one)

    def put(self, name: str, description: Adapter, placed: Placed, trainable: bool) -> None:
        """Add an adapter, described without its tensors, that is known to fit; `attach` checks that, and calls this.

        Raises:
            AdapterError: the name is empty or taken, or a layer has a `lora` of its own; nothing is changed then.
        """
        self.refuse_name(name)
        entry = Entry(description, placed.targets, tuple(placed.tensors), tuple(placed.modules), placed.ties)
        refuse_occupied({path: holder_of(layer_at(self.model, path)) for path in entry.places}, self._route)
        deltas = make_deltas(self.model, description.config, placed)
        with uninterrupted():
            if not self._roster.entries:
                self._flags = take_hold(self.model, self)
            try:
                join(self.model, self._route, escape(name), deltas, trainable)
            except BaseException:
                part(self.model, escape(name), entry.places)
                if not self._roster.entries:
                    let_go(self.model, self._flags)
                raise
            self._roster.entries[name] = entry
            if len(self._roster.entries) == 1:
                self._route.switch({name: 1.0})

    def survey(self, *, fresh: bool = False) -> Survey:
        """Return what the model consists of; read once and kept, so that later adapters do not walk the model.

        Args:
            fresh: read it again; the model may have got other layers since.
        """
        if self._survey is None or fresh:
            self._survey = Survey(self.model)
        return self._survey

    def refuse_name(self, name: str) -> None:
        """Raise AdapterError if no adapter can get this name: it is empty, or taken."""
        self._roster.refuse_new(name)

    def _remove(self, name: str) -> None:
        part(self.model, escape(name), self._roster.entries.pop(name).places)
        self._route.drop(escape(name))
        if not self._roster.entries:
            let_go(self.model, self._flags)

    def _merge(self, names: Names | None, *, keep_base: bool) -> None:
        self._route.refuse_strangers()
        if self._route.plan is not None:
            raise AdapterError("a merge holds for all rows, but rows() says what acts; leave its block first.")
        weights = self._route.live if names is None else by_key(self._roster.weights(names))
        if self._merged is not None:
            if names is not None and weights != self._merged.weights:
                shown = ", ".join(self.merged_names)
                raise MergeError(f"already merged: {shown}; unmerge() before merging another set or other weights.")
            self._merged.kept = self._merged.kept if keep_base else None
            return
        if not weights:
            listed = self._roster.listed()
            raise AdapterError(f"no adapter is active, so there is nothing to merge; name one of: {listed}.")
        named = {unescape(key): weight for key, weight in weights.items()}
        parts = gather_parts(self.model, {name: self._roster.find(name).places for name in named}, named)
        with uninterrupted():
            kept, untied = merge_into(self.model, parts, keep_base=keep_base)
            self._merged = Merged(dict(weights), self._route.live, kept, untied)
            self._route.live = {}

    def _unmerge(self) -> None:
        merged = self._merged
        if merged is None or merged.kept is None:
            raise MergeError("the base was merged with keep_base=False: its weights are gone; load the base again.")
        with uninterrupted():
            restore(self.model, merged.kept, merged.untied)
            self._route.live = merged.before
            self._merged = None

    def _refuse_merged(self, what: str) -> None:
        if self._merged is not None:
            shown = ", ".join(self.merged_names)
            raise MergeError(f"{what} while {shown} is merged into the weights; unmerge() first.")

    def _refuse_inside(self, what: str) -> None:
        if self._route.depth:
            raise AdapterError(f"{what} inside a using(), rows() or disabled() block; leave it first.")
