"""Adapter: a configuration and its tensors as a value that knows no model, and its directory of files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sideroad.adapter_files import CONFIG, MANIFEST, WEIGHTS, find_weights, must_not_replace, refuse_elsewhere
from sideroad.config import AdapterConfig, validate
from sideroad.errors import AdapterError, ConfigError, did_you_mean, raise_findings
from sideroad.files import JSON, json_text, parse_object, read_json, replace_directory, write_bytes
from sideroad.folding import acting_pair, fold, unfold
from sideroad.kinds.experts import per_expert
from sideroad.lowrank import LowRank
from sideroad.pairs import blocks, matrices, out_of, slices_of
from sideroad.peft_adalora import KIND, plain_fields, plain_tensors
from sideroad.peft_experts import fold_experts, unfold_experts
from sideroad.peft_fields import shown
from sideroad.peft_format import (
    Reading,
    file_rank,
    file_ranks,
    read_config,
    said_rank,
    saved_names,
    unfold_slices,
    write_config,
)
from sideroad.peft_keys import BASE, EXPERTS, PEFT_CONVOLUTION, Sorted, from_tensors, to_tensors
from sideroad.peft_parts import attention_findings
from sideroad.peft_targets import names_in
from sideroad.scaling import scale
from sideroad.targets import alpha_of, rank_of
from sideroad.tensor_checks import bias_findings, weight_findings
from sideroad.tensor_files import read_sharded, read_tensors, same_bits, shorten, write_tensors

logger = logging.getLogger(__name__)

RESERVED = ("base", "config")
"""Names in sideroad.json that `save` writes itself; a manifest cannot use them."""


@dataclass(frozen=True)
class BaseRecord:
    """Which base an adapter was made for: its name, where it comes from, the hash of its weights, its licence."""

    name: str | None = None
    source: str | None = None
    sha256: str | None = None
    licence: str | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as a value.

    Args:
        weights: module path → `A` [rank, in] and `B` [out, rank] (other kinds of layers: `sideroad.kinds`; slices:
            compact, `sideroad.pairs`; fused experts have a path for each stacked weight), what a method has beside
            them (`magnitude` [out], `E` [rank, 1], a start `A0`, `B0` to be subtracted), and `bias` [out] where one was
            trained; a module whose bias alone was trained has only `bias`; `rows` [ids, dim] of trained tokens. Ranks
            come from these tensors, whatever `config` says.
        base: the model it was made for.
        modules: path of a module trained whole → its state.
        kinds: path → `embedding`, `attention-output`, `experts` or `peft-convolution`, for pairs that files name or
            hold, or PEFT computes, in another way.
        foreign: harmless fields of others in adapter_config.json; they are written back as they are.
        manifest: our own extras, kept in sideroad.json beside PEFT's files; any JSON but the names in `RESERVED`.
    """

    config: AdapterConfig
    weights: Mapping[str, Mapping[str, Tensor]]
    base: BaseRecord | None = None
    task_type: str | None = "CAUSAL_LM"
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    foreign: Mapping[str, JSON] = field(default_factory=dict)
    manifest: Mapping[str, JSON] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the modules that have a pair."""
        return tuple(path for path, leaves in self.weights.items() if "A" in leaves)

    @property
    def parameters(self) -> int:
        """Number of stored values, biases, rows and whole modules included."""
        return sum(tensor.numel() for _, _, tensor in self._tensors())

    @property
    def ranks(self) -> dict[str, int]:
        """Module path → rank of its pair; of each, where it has several (slices, groups)."""
        return {path: file_rank(self.weights[path], rank_of(self.config, path)) for path in self.paths}

    def scale(self, path: str) -> float:
        """Return s of `W' = W + s·B·A` for a module.

        Raises:
            AdapterError: the adapter has no pair for this module.
        """
        return scale(self.config, path, file_rank(self._pair(path), rank_of(self.config, path)))

    def lower(self, path: str) -> LowRank:
        """Return what the adapter adds to a module's weight, in fp32 (fp64 where stored so), the scale folded into B.

        Raises:
            AdapterError: the adapter has no pair for this module, or it has a magnitude, whose effect needs the weight.
        """
        return self._lowered(path, *self._acting(path))

    def lower_by_expert(self, path: str) -> tuple[LowRank, ...]:
        """Return what `lower` does in parts: one for each expert of a stacked weight, one alone for any other layer.

        The parts, [out, in] each, lie one above another; one pair for all of them would be mostly zeros.

        Raises:
            AdapterError: the adapter has no pair for this module.
        """
        if self.kinds.get(path) != EXPERTS:
            return (self.lower(path),)
        A, B = self._acting(path)
        return tuple(map(LowRank, *per_expert(A, B * self.scale(path), A.shape[0] // B.shape[1])))

    def pair(self, path: str) -> LowRank:
        """Return what `lower` does, of the pair alone: a magnitude beside it is left out.

        Raises:
            AdapterError: the adapter has no pair for this module.
        """
        return self._lowered(path, *_wide(acting_pair(self._pair(path))))

    def folded(self) -> Adapter:
        """Return the same adapter with one ordinary pair on each layer, as files hold it."""
        config, weights = fold(self.config, self.weights)
        return replace(self, config=config, weights=weights)

    def same_weights(self, other: Adapter) -> bool:
        """Say whether both hold the same tensors, bit for bit."""
        mine, theirs = ({(path, leaf): tensor for path, leaf, tensor in one._tensors()} for one in (self, other))
        return mine.keys() == theirs.keys() and all(same_bits(tensor, theirs[key]) for key, tensor in mine.items())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_unknown: tuple[str, ...] = ()) -> Adapter:
        """Read an adapter directory as PEFT (any version) or `save` writes it.

        Args:
            allow_unknown: fields of adapter_config.json to accept though we do not know them.
        Raises:
            AdapterError: anything that is missing, broken, not finite or cannot be honoured, all at once.
        """
        directory = Path(path)
        refuse_elsewhere(directory)
        fields = read_json(directory / CONFIG)
        source = find_weights(directory)
        tensors = read_sharded(source) if source.name.endswith(".json") else read_tensors(source)
        if fields.get("peft_type") == KIND:
            fields, tensors = plain_fields(fields), plain_tensors(tensors)
        found = from_tensors(tensors, saved_names(fields))
        fields, found.weights = unfold_slices(fields, found.weights)
        findings = found.findings + unfold_experts(found, names_in(fields), lambda path: said_rank(fields, path))
        findings += weight_findings(found.weights, found.modules, found.kinds)
        ranks = {} if findings else file_ranks(fields, found.weights, found.kinds)
        reading = read_config(
            fields, ranks, found, stored_float32=_stored_float32(found.weights), allow_unknown=allow_unknown,
            source=CONFIG,
        )  # fmt: skip
        if not reading.findings:
            findings += bias_findings(reading.config, found.weights)
        raise_findings(AdapterError, f"{directory} cannot be used", shorten([*reading.findings, *findings]))
        manifest = read_json(directory / MANIFEST) if os.path.lexists(directory / MANIFEST) else {}
        base, exact = manifest.pop("base", None), manifest.pop("config", None)
        theirs = [] if exact is not None else _convolutions(found.weights)
        adapter = cls(
            config=reading.config,
            weights=found.weights,
            base=_base(reading, base, directory),
            task_type=reading.task_type,
            modules=found.modules,
            kinds=found.kinds | dict.fromkeys(theirs, PEFT_CONVOLUTION),
            foreign=reading.foreign,
            manifest=manifest,
        )
        if adapter.config.bias != "none" and not any("bias" in leaves for leaves in adapter.weights.values()):
            logger.warning("%s trained biases, but the file holds none: PEFT 0.11 to 0.15 left them out", directory)
        return adapter._with_exact_config(exact, fields, directory)

    def save(self, path: str | os.PathLike[str], *, card: str | None = None) -> None:
        """Write a directory that PEFT reads, in one step: a reader finds the old adapter or the new one, whole.

        The tensors are read back and compared bit for bit before the directory takes its place.

        Args:
            path: a new or empty directory, or one that holds nothing but an adapter, which is then replaced.
            card: text of README.md, the model card.
        Raises:
            AdapterError: tensors that do not fit together or are not finite, extras that are not JSON, a directory
                with other things in it, a full disk; what was there before is then untouched.
        """
        plain = self.folded()
        experts = [path for path, kind in self.kinds.items() if kind == EXPERTS]
        findings = weight_findings(plain.weights, plain.modules, experts=experts)
        findings += bias_findings(plain.config, plain.weights)
        alphas = {path: alpha_of(self.config, path) for path in self.paths}
        findings += [] if findings else attention_findings(self.ranks, alphas, self.kinds)
        findings += [
            f'manifest has the key "{key}", which save writes itself' for key in RESERVED if key in self.manifest
        ]
        raise_findings(AdapterError, f"the adapter for {Path(path)} cannot be saved", shorten(findings))
        lost = unfold(self.config, plain.weights) is None
        files = plain._texts(card, plain.config if lost else self.config)

        def build(draft: Path) -> None:
            for name, text in files.items():
                write_bytes(draft / name, text.encode())
            weights = fold_experts(plain.weights, plain.kinds)
            write_tensors(draft / WEIGHTS, to_tensors(weights, plain.modules, plain.kinds))

        replace_directory(Path(path), build, objection=must_not_replace)

    def _texts(self, card: str | None, exact: AdapterConfig) -> dict[str, str]:
        fields = self._fields()
        again = read_config(
            fields, self.ranks, self._held(), stored_float32=_stored_float32(self.weights),
            allow_unknown=tuple(self.foreign),
        )  # fmt: skip
        raise_findings(AdapterError, "the adapter cannot be saved", shorten(list(again.findings)))
        extras: dict[str, Any] = dict(self.manifest)
        if self.base and (self.base.source or self.base.sha256 or self.base.licence):
            extras["base"] = asdict(self.base)
        agrees = all(rank_of(self.config, path) == rank for path, rank in self.ranks.items())
        ours = [path for path in _convolutions(self.weights) if self.kinds.get(path) != PEFT_CONVOLUTION]
        if (again.config != exact or ours) and agrees:
            extras["config"] = exact.model_dump(mode="json")
        try:
            "" if card is None else card.encode()
            # Parsing again refuses what Python would write but no strict reader accepts.
            files = {CONFIG: json_text(fields)} | ({MANIFEST: json_text(extras)} if extras else {})
            for text in files.values():
                parse_object(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise AdapterError(
                f"manifest, foreign fields, names or card are not JSON or text: {error}. Allowed: null, booleans, "
                "finite numbers, strings, lists, and mappings with string keys."
            ) from error
        return files | ({} if card is None else {"README.md": card})

    def _fields(self) -> dict[str, Any]:
        base = self.base.name if self.base else None
        return write_config(
            self.config, self.ranks, self._held(), task_type=self.task_type, base_name=base, foreign=self.foreign
        )

    def _held(self) -> Sorted:
        return Sorted(dict(self.weights), dict(self.modules), dict(self.kinds))  # type: ignore[arg-type]

    def _with_exact_config(self, stored: Any, fields: Mapping[str, Any], directory: Path) -> Adapter:
        """Take the configuration that sideroad.json holds where it says the same as adapter_config.json."""
        if stored is None:
            return self
        try:
            config = validate(AdapterConfig, stored, str(directory / MANIFEST))
            weights = unfold(config, self.weights)
        except ConfigError as error:
            raise AdapterError(f'{str(error)[:2000]} Delete "config" there to use {CONFIG} alone.') from error
        exact = self if weights is None else replace(self, config=config, weights=weights)
        return exact if exact.folded()._fields() == dict(fields) else self

    def _pair(self, path: str) -> Mapping[str, Tensor]:
        leaves = self.weights.get(path, {})
        if "A" not in leaves:
            hint = did_you_mean(path, self.paths)
            raise AdapterError(
                f'the adapter has no pair for "{path}".{hint} It has {len(self.paths)}, such as {self.paths[:1]}.'
            )
        return leaves

    def _acting(self, path: str) -> tuple[Tensor, Tensor]:
        pair = self._pair(path)
        if "magnitude" in pair:
            raise AdapterError(
                f"{path} has a DoRA magnitude: what it adds depends on the base's weight; attach it, and merge instead."
            )
        return _wide(acting_pair(pair))

    def _lowered(self, path: str, A: Tensor, B: Tensor) -> LowRank:
        parts = slices_of(self.config, path)
        where = None if parts is None else blocks(parts, out_of(parts, B.shape[0]))
        return LowRank(*matrices(A, B * self.scale(path), where, 0 if parts is None else out_of(parts, B.shape[0])))

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for path, leaves in [*self.weights.items(), *self.modules.items()]:
            for leaf, tensor in leaves.items():
                if leaf != BASE:
                    yield path, leaf, tensor


def _wide(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    A, B = (one if one.dtype == torch.float64 else one.float() for one in pair)
    return A, B


def _convolutions(weights: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    return [path for path, leaves in weights.items() if "A" in leaves and leaves["A"].ndim > 2]


def _stored_float32(weights: Mapping[str, Mapping[str, Tensor]]) -> bool:
    stored = [leaves[leaf].dtype for leaves in weights.values() for leaf in ("A", "rows") if leaf in leaves]
    return not stored or torch.float32 in stored


def _base(reading: Reading, stored: Any, directory: Path) -> BaseRecord | None:
    if stored is not None:
        known = set(BaseRecord.__dataclass_fields__)
        if (
            not isinstance(stored, dict)
            or set(stored) - known
            or not all(isinstance(value, str | None) for value in stored.values())
        ):
            raise AdapterError(
                f'{directory / MANIFEST}: "base" is {shown(stored)}; '
                f"allowed: {', '.join(sorted(known))}, each a string or null."
            )
        record = BaseRecord(**stored)
        # A name changed in PEFT's file is the newer statement; the hash then belongs to another model.
        return record if record.name == reading.base_name else BaseRecord(reading.base_name)
    return BaseRecord(reading.base_name) if reading.base_name else None
