"""Adapter: a configuration and its tensors as a value that knows no model, and its directory of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sideroad.adapter_files import CONFIG, MANIFEST, WEIGHTS, find_weights, must_not_replace, refuse_elsewhere
from sideroad.config import AdapterConfig, validate
from sideroad.errors import AdapterError, ConfigError, did_you_mean, raise_findings
from sideroad.files import JSON, json_text, parse_object, read_json, replace_directory, write_bytes
from sideroad.lowrank import LowRank
from sideroad.peft_format import Reading, read_config, write_config
from sideroad.peft_keys import from_tensors, module_key, path_order, to_tensors
from sideroad.scaling import scale
from sideroad.targets import rank_of
from sideroad.tensor_files import read_sharded, read_tensors, same_bits, shorten, write_tensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types that an adapter's tensors may have."""

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
        weights: module path → `A` [rank, in] and `B` [out, rank], and `bias` [out] where one was trained; a module
            whose bias alone was trained has only `bias`. Ranks come from these tensors, whatever `config` says.
        base: the model it was made for.
        foreign: harmless fields of others in adapter_config.json; they are written back as they are.
        manifest: our own extras, kept in sideroad.json beside PEFT's files; any JSON but the names in `RESERVED`.
    """

    config: AdapterConfig
    weights: Mapping[str, Mapping[str, Tensor]]
    base: BaseRecord | None = None
    task_type: str | None = "CAUSAL_LM"
    foreign: Mapping[str, JSON] = field(default_factory=dict)
    manifest: Mapping[str, JSON] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the modules that have a pair."""
        return tuple(path for path, leaves in self.weights.items() if "A" in leaves)

    @property
    def parameters(self) -> int:
        """Number of stored values, biases included."""
        return sum(tensor.numel() for _, _, tensor in self._tensors())

    @property
    def ranks(self) -> dict[str, int]:
        """Module path → rank of its pair."""
        return {path: self.weights[path]["A"].shape[0] for path in self.paths}

    def scale(self, path: str) -> float:
        """Return s of `W' = W + s·B·A` for a module.

        Raises:
            AdapterError: the adapter has no pair for this module.
        """
        return scale(self.config, path, self._pair(path)["A"].shape[0])

    def lower(self, path: str) -> LowRank:
        """Return what the adapter adds to a module's weight, in fp32 (fp64 where stored so), the scale folded into B.

        Raises:
            AdapterError: the adapter has no pair for this module.
        """
        pair = self._pair(path)
        A, B = (pair[leaf] if pair[leaf].dtype == torch.float64 else pair[leaf].float() for leaf in ("A", "B"))
        return LowRank(A, B * self.scale(path))

    def same_weights(self, other: Adapter) -> bool:
        """Say whether both hold the same tensors, bit for bit."""
        if {p: set(leaves) for p, leaves in self.weights.items()} != {p: set(v) for p, v in other.weights.items()}:
            return False
        return all(same_bits(tensor, other.weights[path][leaf]) for path, leaf, tensor in self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_unknown: tuple[str, ...] = ()) -> Adapter:
        """Read an adapter directory as PEFT (any version) or `save` writes it.

        Args:
            allow_unknown: fields of adapter_config.json to accept though we do not know them; "base_layer.weight"
                passes over copies of the base's own weights.
        Raises:
            AdapterError: anything that is missing, broken, not finite or cannot be honoured, all at once.
        """
        directory = Path(path)
        refuse_elsewhere(directory)
        fields = read_json(directory / CONFIG)
        source = find_weights(directory)
        tensors = read_sharded(source) if source.name.endswith(".json") else read_tensors(source)
        weights, findings = from_tensors(tensors, leave_out=allow_unknown)
        findings += weight_findings(weights, lambda p, leaf: module_key(p, leaf, adapted="A" in weights[p]))
        ranks = {} if findings else {p: leaves["A"].shape[0] for p, leaves in weights.items() if "A" in leaves}
        reading = read_config(
            fields, ranks, stored_float32=_stored_float32(weights), allow_unknown=allow_unknown, source=CONFIG
        )
        if not reading.findings:
            findings += _bias_findings(reading.config, weights)
        raise_findings(AdapterError, f"{directory} cannot be used", [*reading.findings, *shorten(findings)])
        manifest = read_json(directory / MANIFEST) if (directory / MANIFEST).exists() else {}
        base, exact = manifest.pop("base", None), manifest.pop("config", None)
        adapter = cls(
            config=reading.config,
            weights=weights,
            base=_base(reading, base, directory),
            task_type=reading.task_type,
            foreign=reading.foreign,
            manifest=manifest,
        )
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
        findings = weight_findings(self.weights, lambda p, leaf: f"{p}.{leaf}") + _bias_findings(
            self.config, self.weights
        )
        findings += [
            f'manifest has the key "{key}", which save writes itself' for key in RESERVED if key in self.manifest
        ]
        raise_findings(AdapterError, f"the adapter for {Path(path)} cannot be saved", shorten(findings))
        files = self._texts(card)

        def build(draft: Path) -> None:
            for name, text in files.items():
                write_bytes(draft / name, text.encode())
            write_tensors(draft / WEIGHTS, to_tensors(self.weights))

        replace_directory(Path(path), build, objection=must_not_replace)

    def _texts(self, card: str | None) -> dict[str, str]:
        fields = self._fields()
        again = read_config(
            fields, self.ranks, stored_float32=_stored_float32(self.weights), allow_unknown=tuple(self.foreign)
        )
        raise_findings(AdapterError, "the adapter cannot be saved", again.findings)
        extras: dict[str, Any] = dict(self.manifest)
        if self.base and (self.base.source or self.base.sha256 or self.base.licence):
            extras["base"] = asdict(self.base)
        if again.config != self.config and all(rank_of(self.config, p) == rank for p, rank in self.ranks.items()):
            extras["config"] = self.config.model_dump(mode="json")
        try:
            # Parsing again refuses what Python would write but no strict reader accepts.
            files = {CONFIG: json_text(fields)} | ({MANIFEST: json_text(extras)} if extras else {})
            for text in files.values():
                parse_object(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise AdapterError(
                f"manifest or foreign fields are not JSON: {error}. Allowed: null, booleans, finite numbers, "
                "strings, lists, and mappings with string keys."
            ) from error
        return files | ({} if card is None else {"README.md": card})

    def _fields(self) -> dict[str, Any]:
        return write_config(
            self.config,
            self.ranks,
            task_type=self.task_type,
            base_name=self.base.name if self.base else None,
            foreign=self.foreign,
        )

    def _with_exact_config(self, stored: Any, fields: Mapping[str, Any], directory: Path) -> Adapter:
        """Take the configuration that sideroad.json holds where it says the same as adapter_config.json."""
        if stored is None:
            return self
        try:
            exact = Adapter(
                validate(AdapterConfig, stored, str(directory / MANIFEST)), self.weights, self.base, self.task_type,
                self.foreign, self.manifest,
            )  # fmt: skip
        except ConfigError as error:
            raise AdapterError(f'{error} Delete "config" there to use {CONFIG} alone.') from error
        return exact if exact._fields() == dict(fields) else self

    def _pair(self, path: str) -> Mapping[str, Tensor]:
        leaves = self.weights.get(path, {})
        if "A" not in leaves:
            hint = did_you_mean(path, self.paths)
            raise AdapterError(
                f'the adapter has no pair for "{path}".{hint} It has {len(self.paths)}, such as {self.paths[:1]}.'
            )
        return leaves

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for path, leaves in self.weights.items():
            for leaf, tensor in leaves.items():
                yield path, leaf, tensor


def weight_findings(weights: Mapping[str, Mapping[str, Tensor]], name: Callable[[str, str], str]) -> list[str]:
    """List what is wrong with an adapter's tensors: halves missing, shapes, types, values that are not finite.

    Args:
        name: how to call the tensor of a module path and leaf in the findings.
    """
    findings = []
    if not any("A" in leaves or "B" in leaves for leaves in weights.values()):
        findings.append("there is no pair of lora_A and lora_B at all; an adapter needs at least one")
    for path in sorted(weights, key=path_order):
        leaves = weights[path]
        unknown = set(leaves) - {"A", "B", "bias"}
        findings += [f"{path} has a tensor {leaf!r}; known: A, B, bias" for leaf in sorted(unknown)]
        for leaf in ("A", "B"):
            other = "B" if leaf == "A" else "A"
            if leaf in leaves and other not in leaves:
                findings.append(f"{name(path, leaf)} has no partner {name(path, other)}")
        bad = [
            wrong
            for leaf in leaves
            if leaf not in unknown
            for wrong in _tensor_findings(name(path, leaf), leaf, leaves)
        ]
        findings += bad or _shape_findings(path, leaves, name)
    return findings


def _tensor_findings(name: str, leaf: str, leaves: Mapping[str, Tensor]) -> Iterator[str]:
    tensor, wanted = leaves[leaf], 1 if leaf == "bias" else 2
    if tensor.ndim != wanted:
        what = " (a convolution's pair; not supported yet)" if tensor.ndim > 2 else ""
        yield f"{name} has shape {list(tensor.shape)}; expected {wanted} dimensions{what}"
    elif not tensor.numel():
        yield f"{name} is empty (shape {list(tensor.shape)}); it was probably saved from a sharded model"
    elif tensor.dtype not in FLOATS:
        yield f"{name} has type {tensor.dtype}; allowed: {', '.join(str(t).removeprefix('torch.') for t in FLOATS)}"
    elif not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        yield f"{name} has {bad} of {tensor.numel()} values that are NaN or infinite; go back to an earlier checkpoint"


def _shape_findings(path: str, leaves: Mapping[str, Tensor], name: Callable[[str, str], str]) -> list[str]:
    if "A" not in leaves or "B" not in leaves:
        return []
    A, B = leaves["A"], leaves["B"]
    findings = []
    if A.shape[0] != B.shape[1]:
        findings.append(
            f"{name(path, 'A')} {list(A.shape)} and {name(path, 'B')} {list(B.shape)} have ranks {A.shape[0]} and "
            f"{B.shape[1]}; expected [rank, in] and [out, rank]"
        )
    if "bias" in leaves and leaves["bias"].shape[0] != B.shape[0]:
        findings.append(
            f"{name(path, 'bias')} has {leaves['bias'].shape[0]} values; the layer has {B.shape[0]} outputs"
        )
    return findings


def _bias_findings(config: AdapterConfig, weights: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    biased = [path for path, leaves in weights.items() if "bias" in leaves]
    stray = [
        path for path in biased if config.bias == "none" or (config.bias == "adapted" and "A" not in weights[path])
    ]
    if not stray:
        return []
    more = f" and {len(stray) - 3} more" if len(stray) > 3 else ""
    return [
        f"there is a bias for {', '.join(stray[:3])}{more}, but the configuration trains {config.bias!r} biases "
        "(PEFT's bias: none, lora_only, all); set it to what the file holds"
    ]


def _stored_float32(weights: Mapping[str, Mapping[str, Tensor]]) -> bool:
    pairs = [leaves["A"].dtype for leaves in weights.values() if "A" in leaves]
    return not pairs or torch.float32 in pairs


def _base(reading: Reading, stored: Any, directory: Path) -> BaseRecord | None:
    if stored is not None:
        known = set(BaseRecord.__dataclass_fields__)
        if (
            not isinstance(stored, dict)
            or set(stored) - known
            or not all(isinstance(value, str | None) for value in stored.values())
        ):
            raise AdapterError(
                f'{directory / MANIFEST}: "base" is {stored!r}; '
                f"allowed: {', '.join(sorted(known))}, each a string or null."
            )
        record = BaseRecord(**stored)
        # A name changed in PEFT's file is the newer statement; the hash then belongs to another model.
        return record if record.name == reading.base_name else BaseRecord(reading.base_name)
    return BaseRecord(reading.base_name) if reading.base_name else None
