"""What is in an adapter directory: files, base, configuration, counts, ranks, scales, norms and spectra."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sideroad.adapter import Adapter, BaseRecord
from sideroad.analyze.spectrum import effective_rank, stable_rank
from sideroad.config import AdapterConfig
from sideroad.files import JSON
from sideroad.peft_keys import EXPERTS
from sideroad.targets import alpha_of


@dataclass(frozen=True)
class FileReport:
    """A file of the directory and its size in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class MagnitudeReport:
    """A DoRA magnitude: how many values it has, and its smallest and largest."""

    values: int
    smallest: float
    largest: float


@dataclass(frozen=True)
class RankReport:
    """Ranks over all adapted layers, each counted once however many pairs it has.

    Args:
        without: layers that the configuration excludes by their whole path, as it does those that were dealt no rank.
    """

    smallest: int
    largest: int
    total: int
    layers: int
    without: int


@dataclass(frozen=True)
class ModuleReport:
    """One adapted module; norms are Frobenius norms, `norm` and the spectrum those of s·B·A.

    Args:
        rank: that was trained; `file_rank` is that of the one pair in the file, larger where a start that is subtracted
            or the pairs of slices are folded into it.
        parameters: stored values but for a bias.
        effective_rank: exp of the entropy of the singular values; 0 where the product is zero.
        stable_rank: squared Frobenius norm over squared largest singular value; 0 where the product is zero.
        largest: the largest singular value, that is the spectral norm.
        experts: how many experts' weights are stacked in it; shapes are then those of one, ranks means over all of
            them, `largest` the largest of any. None for other modules.
        magnitude: of DoRA; norms and spectrum are then those of the pair alone, and the whole change needs the base.
    """

    path: str
    out_features: int
    in_features: int
    rank: int
    file_rank: int
    alpha: float
    scale: float
    dtype: str
    parameters: int
    norm: float
    norm_a: float
    norm_b: float
    effective_rank: float
    stable_rank: float
    largest: float
    experts: int | None = None
    magnitude: MagnitudeReport | None = None

    @property
    def leaf(self) -> str:
        """Last name of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class GroupReport:
    """All adapted modules of one leaf name; values without a bound in their name are means."""

    leaf: str
    modules: int
    parameters: int
    rank_min: int
    rank_max: int
    file_rank_min: int
    file_rank_max: int
    norm: float
    norm_max: float
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True)
class AdapterReport:
    """Everything `inspect_adapter` finds.

    Args:
        biases: path → norm of its trained bias.
        rows: path of an embedding or head → how many of its rows are trained.
        whole: path of a module trained whole → its values.
        ranks: None where nothing has a pair.
    """

    path: str
    files: tuple[FileReport, ...]
    base: BaseRecord | None
    task_type: str | None
    config: AdapterConfig
    parameters: int
    tensor_bytes: int
    dtypes: dict[str, int]
    ranks: RankReport | None
    modules: tuple[ModuleReport, ...]
    groups: tuple[GroupReport, ...]
    biases: dict[str, float]
    rows: dict[str, int]
    whole: dict[str, int]
    foreign: dict[str, JSON]
    manifest: dict[str, JSON]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {**asdict(self), "config": self.config.model_dump(mode="json")}


def inspect_adapter(path: str | os.PathLike[str], *, allow_unknown: tuple[str, ...] = ()) -> AdapterReport:
    """Read an adapter directory and measure what is in it.

    Args:
        allow_unknown: as in `Adapter.load`.
    Raises:
        AdapterError: the directory cannot be read as an adapter.
    """
    directory = Path(path)
    adapter = Adapter.load(directory, allow_unknown=allow_unknown)
    held = [*adapter.weights.values(), *adapter.modules.values()]
    tensors = [tensor for leaves in held for tensor in leaves.values()]
    file_ranks = adapter.folded().ranks
    modules = tuple(_module(adapter, name, file_ranks[name]) for name in adapter.paths)
    return AdapterReport(
        path=str(directory),
        files=tuple(
            FileReport(file.name, file.stat().st_size) for file in sorted(directory.iterdir()) if file.is_file()
        ),
        base=adapter.base,
        task_type=adapter.task_type,
        config=adapter.config,
        parameters=adapter.parameters,
        tensor_bytes=sum(tensor.numel() * tensor.itemsize for tensor in tensors),
        dtypes=dict(Counter(_name(tensor) for tensor in tensors)),
        ranks=ranks_of(adapter),
        modules=modules,
        groups=_groups(modules),
        biases={name: _norm(leaves["bias"]) for name, leaves in adapter.weights.items() if "bias" in leaves},
        rows={name: len(leaves["rows"]) for name, leaves in adapter.weights.items() if "rows" in leaves},
        whole={name: sum(one.numel() for one in state.values()) for name, state in adapter.modules.items()},
        foreign=dict(adapter.foreign),
        manifest=dict(adapter.manifest),
    )


def ranks_of(adapter: Adapter) -> RankReport | None:
    """Return the ranks of an adapter's layers in short; None where nothing has a pair."""
    ranks = adapter.ranks.values()
    if not ranks:
        return None
    without = sum(1 for pattern in adapter.config.exclude if _is_path(pattern))
    return RankReport(min(ranks), max(ranks), sum(ranks), len(ranks), without)


def _is_path(pattern: str) -> bool:
    """Whether a pattern is `re:` and one escaped path."""
    written = pattern.removeprefix("re:")
    return written != pattern and re.escape(re.sub(r"\\(.)", r"\1", written)) == written


def _module(adapter: Adapter, path: str, file_rank: int) -> ModuleReport:
    leaves = adapter.weights[path]
    A, B, m = leaves["A"], leaves["B"], leaves.get("magnitude")
    parts = adapter.lower_by_expert(path) if m is None else (adapter.pair(path),)
    spectra = [part.singular_values().double() for part in parts]
    return ModuleReport(
        path=path,
        out_features=parts[0].shape[0],
        in_features=parts[0].shape[1],
        rank=adapter.ranks[path],
        file_rank=file_rank,
        alpha=alpha_of(adapter.config, path),
        scale=adapter.scale(path),
        dtype=_name(A),
        parameters=sum(one.numel() for leaf, one in leaves.items() if leaf != "bias"),
        norm=float(torch.cat(spectra).square().sum().sqrt()),
        norm_a=_norm(A),
        norm_b=_norm(B),
        effective_rank=_mean(map(effective_rank, spectra)),
        stable_rank=_mean(map(stable_rank, spectra)),
        largest=max(float(values.max()) for values in spectra),
        experts=len(parts) if adapter.kinds.get(path) == EXPERTS else None,
        magnitude=None if m is None else MagnitudeReport(m.numel(), float(m.min()), float(m.max())),
    )


def _groups(modules: Iterable[ModuleReport]) -> tuple[GroupReport, ...]:
    by_leaf: dict[str, list[ModuleReport]] = {}
    for module in modules:
        by_leaf.setdefault(module.leaf, []).append(module)
    return tuple(
        GroupReport(
            leaf=leaf,
            modules=len(found),
            parameters=sum(module.parameters for module in found),
            rank_min=min(module.rank for module in found),
            rank_max=max(module.rank for module in found),
            file_rank_min=min(module.file_rank for module in found),
            file_rank_max=max(module.file_rank for module in found),
            norm=_mean(module.norm for module in found),
            norm_max=max(module.norm for module in found),
            effective_rank=_mean(module.effective_rank for module in found),
            stable_rank=_mean(module.stable_rank for module in found),
        )
        for leaf, found in by_leaf.items()
    )


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
