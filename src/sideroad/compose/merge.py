"""merge: a base and its adapters become one model directory that needs neither sideroad nor PEFT."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sideroad import __version__
from sideroad.adapter import Adapter, BaseRecord
from sideroad.attaching import Attached, attach
from sideroad.base import Base, BaseConfig, BaseIdentity, load_base, load_meta
from sideroad.base.progress import OnProgress
from sideroad.base.quiet import quiet
from sideroad.errors import MergeError, raise_findings
from sideroad.files import JSON, json_text, read_json, refuse_occupied_path, replace_directory, write_bytes
from sideroad.kinds.experts import Experts, layer_at, per_expert
from sideroad.lowrank import LowRank, changed
from sideroad.methods.lora import LoraDelta
from sideroad.tensor_files import read_tensors, same_bits, shorten
from sideroad.vocabulary import grow
from sideroad.weights import read_dense

logger = logging.getLogger("sideroad.compose.merge")

MergeDtype = Literal["auto", "float32", "bfloat16", "float16"]
Weighted = Mapping[str | os.PathLike[str], float] | Sequence[str | os.PathLike[str]]
"""Adapter directories, each with its weight; a list gives every one the weight 1."""

PROVENANCE = "sideroad.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergedAdapter:
    """One of the adapters that went into a merged model."""

    name: str
    weight: float
    base: BaseRecord | None
    parameters: int
    modules: int


@dataclass(frozen=True)
class MergeReport:
    """What `merge` wrote.

    Args:
        rounding: largest share of an adapted weight's change that rounding to `dtype` took, as Frobenius norms
            (0.01: one percent); None where nothing changed.
        untied: layers whose weight no longer is the embedding's.
        files: name → bytes.
    """

    path: str
    base: BaseIdentity
    adapters: tuple[MergedAdapter, ...]
    dtype: str
    modules: int
    rounding: float | None
    untied: tuple[str, ...]
    files: dict[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return asdict(self)


def merge(
    adapters: Weighted,
    out: str | os.PathLike[str],
    *,
    base: BaseConfig | None = None,
    dtype: MergeDtype = "auto",
    any_base: bool = False,
    offline: bool = False,
    on_progress: OnProgress | None = None,
) -> MergeReport:
    """Add adapters to a base's weights and save the model, in one step and read back.

    Sums run in fp32 on the CPU and are rounded once.

    Args:
        out: a new or empty directory, or one that an earlier merge wrote, which is then replaced.
        base: the model; by default the one that the adapters name.
        dtype: type of the saved weights; `auto` is what the base's configuration states.
        any_base: merge although an adapter says that it was made for other weights.
    Raises:
        MergeError: no adapter, adapters of different bases, another base, a result that is not finite in `dtype`.
        AdapterError: an adapter cannot be read or does not fit, or `out` cannot be written.
        BaseModelError: the base cannot be loaded.
    """
    refuse_occupied_path(Path(out), _objection)
    weights = {Path(p): float(w) for p, w in _weighted(adapters)}
    values = {path: Adapter.load(path) for path in weights}
    settings = (base or _named_base(values)).model_copy(update={"device": "cpu"})
    stored = _stored_dtype(settings, offline)
    target = stored if dtype == "auto" else _DTYPES[dtype]
    # The wider of both types holds the base exactly, so that only the result is rounded.
    loaded = load_base(settings, offline=offline, dtype=torch.promote_types(stored, target), on_progress=on_progress)
    notes = [*_check_base(values, loaded.identity, any_base), *loaded.notes[1:]]
    names = _names(values)
    handle = _attach(loaded.model, {names[path]: (values[path], weights[path]) for path in values})
    rounding = _rounding(handle, target)
    handle.merge_and_unload()
    loaded.model.to(target)
    _refuse_infinite(loaded.model, target)
    merged = tuple(
        MergedAdapter(names[path], weights[path], value.base, value.parameters, len(value.paths))
        for path, value in values.items()
    )
    report = MergeReport(
        path=str(out),
        base=loaded.identity,
        adapters=merged,
        dtype=str(target).removeprefix("torch."),
        modules=len({module for value in values.values() for module in value.paths}),
        rounding=rounding,
        untied=handle.untied,
        files={},
        notes=tuple(notes),
    )
    prompt = next(iter(values.values())).manifest.get("prompt") if len(values) == 1 else None
    replace_directory(Path(out), lambda draft: _write(draft, loaded, report, prompt), objection=_objection)
    files = {file.name: file.stat().st_size for file in sorted(Path(out).iterdir()) if file.is_file()}
    return MergeReport(**{**report.__dict__, "files": files})


def _weighted(adapters: Weighted) -> Iterable[tuple[str | os.PathLike[str], float]]:
    if isinstance(adapters, str | os.PathLike):
        raise MergeError(f'adapters is one path, "{adapters}"; give a list of paths, or a mapping of paths to weights.')
    pairs = list(adapters.items()) if isinstance(adapters, Mapping) else [(path, 1.0) for path in adapters]
    if not pairs:
        raise MergeError("no adapter to merge; give at least one adapter directory.")
    paths = [str(Path(path)) for path, _ in pairs]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise MergeError(f"given twice: {', '.join(twice)}. Give each adapter once, with the weight it should have.")
    return pairs


def _named_base(values: Mapping[Path, Adapter]) -> BaseConfig:
    named = {path: value.base.name for path, value in values.items() if value.base and value.base.name}
    if not named:
        raise MergeError(f"{next(iter(values))} does not say which base it was made for; give the base.")
    if len(set(named.values())) > 1:
        listed = "\n".join(f"  - {path}: {name}" for path, name in named.items())
        raise MergeError(f"the adapters name different bases; give the base to merge into.\n{listed}")
    return BaseConfig(model=next(iter(named.values())))


def _stored_dtype(settings: BaseConfig, offline: bool) -> torch.dtype:
    if settings.dtype != "auto":
        return _DTYPES[settings.dtype]
    stated = getattr(load_meta(settings, offline=offline).config, "dtype", None)
    return stated if isinstance(stated, torch.dtype) and stated in _DTYPES.values() else torch.float32


def _check_base(values: Mapping[Path, Adapter], identity: BaseIdentity, any_base: bool) -> list[str]:
    findings, notes = [], []
    for path, value in values.items():
        made_for = value.base
        if made_for and made_for.sha256 and made_for.sha256 != identity.sha256:
            findings.append(
                f"{path} was made for {made_for.name} (weights {made_for.sha256[:12]}…), but the base is "
                f"{identity.name} (weights {identity.sha256[:12]}…). Give its own base, or allow any base "
                "(any_base) if you know that they fit"
            )
        elif not made_for or not made_for.sha256:
            said = f'says only "{made_for.name}"' if made_for and made_for.name else "does not say"
            notes.append(f"{path} {said} which base it was made for; its weights' checksum is unknown")
    if not any_base:
        raise_findings(MergeError, "adapters for another base", findings)
    return notes + (findings if any_base else [])


def _names(values: Mapping[Path, Adapter]) -> dict[Path, str]:
    """Name adapters after their directories; equal names get a number."""
    names: dict[Path, str] = {}
    for path in values:
        own = path.resolve()
        stem = own.parent.name if own.name == "adapter" and own.parent.name else own.name or "adapter"
        count = sum(name == stem or name.startswith(f"{stem}-") for name in names.values())
        names[path] = f"{stem}-{count + 1}" if count else stem
    return names


def _attach(model: nn.Module, adapters: Mapping[str, tuple[Adapter, float]]) -> Attached:
    for name, (value, _) in adapters.items():
        grow(model, value)
        handle = attach(model, value, name)
    handle.activate({name: weight for name, (_, weight) in adapters.items()})
    return handle


def _refuse_infinite(model: nn.Module, target: torch.dtype) -> None:
    broken = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    findings = [
        f"{name} does not fit {str(target).removeprefix('torch.')}: it would hold infinities" for name in broken
    ]
    raise_findings(MergeError, "the merged model is not saved; choose bfloat16 or float32", shorten(findings))


def _rounding(handle: Attached, target: torch.dtype) -> float | None:
    """Return the largest loss of a layer by rounding, relative to its change; layer by layer, nothing is kept."""
    changes: dict[str, list[tuple[tuple[LowRank, ...], float]]] = {}
    for name, factor in handle.active.items():
        for path, delta in handle.deltas(name).items():
            if isinstance(delta, LoraDelta):
                changes.setdefault(path, []).append((_lowered(delta, layer_at(handle.model, path)), factor))
    shares = []
    for path, found in changes.items():
        # a stacked weight has as many parts as experts, which lie one above another
        weights = read_dense(layer_at(handle.model, path)).chunk(len(found[0][0]))
        sizes, losses = [], []
        for index, weight in enumerate(weights):
            exact = changed(weight.double(), [(parts[index], factor) for parts, factor in found])
            sizes.append(float((exact - weight).norm()))
            losses.append(float((exact.to(target).double() - exact).norm()))
        if any(sizes):
            shares.append(math.hypot(*losses) / math.hypot(*sizes))
    return max(shares, default=None)


def _lowered(delta: LoraDelta, layer: nn.Module) -> tuple[LowRank, ...]:
    """A layer's change in as many parts as it has experts; one for an ordinary layer."""
    if not isinstance(delta.kind, Experts):
        return (delta.lower(layer),)
    A, B = (one.detach().float() for one in delta.factors())
    return tuple(map(LowRank, *per_expert(A, B * delta.scale, A.shape[0] // B.shape[1])))


def _objection(path: Path) -> str | None:
    if (path / PROVENANCE).exists() and "merged" in read_json(path / PROVENANCE):
        return None
    return "it holds something that no merge wrote."


def _write(draft: Path, base: Base, report: MergeReport, prompt: JSON) -> None:
    if isinstance(prompt, Mapping) and prompt.get("chat_template"):
        base.tokenizer.chat_template = prompt["chat_template"]
    with quiet():
        base.model.save_pretrained(draft)
        base.tokenizer.save_pretrained(draft)
    _compare(draft, base.model)
    merged = {**report.to_json(), "sideroad": __version__}
    for name in ("path", "files"):
        del merged[name]
    record: dict[str, JSON] = {"merged": merged} | ({} if prompt is None else {"prompt": prompt})
    write_bytes(draft / PROVENANCE, json_text(record).encode())
    write_bytes(draft / "README.md", _card(report).encode())


def _compare(draft: Path, model: nn.Module) -> None:
    """Read every tensor back; what is not in the files must share its memory with something that is."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    seen: set[str] = set()
    for file in sorted(draft.glob("*.safetensors")):
        for name, tensor in read_tensors(file, MergeError).items():
            seen.add(name)
            if name in state and not same_bits(tensor, state[name]):
                raise MergeError(f"{file.name}: {name} reads back differently; the disk or memory is not reliable.")
    places = {state[name].data_ptr() for name in seen & set(state)}
    lost = [name for name in state if name not in seen and state[name].data_ptr() not in places]
    # Architectures that transformers stores under other names than it holds have names of their own in the files.
    if lost and seen <= set(state):
        raise MergeError(f"{', '.join(lost[:5])} would be missing from the saved model; nothing was put in place.")
    if lost:
        logger.warning("%d tensors are stored under other names and were not compared", len(lost))


def _card(report: MergeReport) -> str:
    licence = report.base.licence
    front = [f"license: {json.dumps(licence)}"] if licence else []
    listed = "\n".join(
        f"- {one.name}, weight {one.weight:g}, {one.modules} layers, {one.parameters:,} parameters"
        for one in report.adapters
    )
    rounding = "" if report.rounding is None else f" Rounding took at most {report.rounding:.2%} of a layer's change."
    return (
        "\n".join(["---", f"base_model: {json.dumps(report.base.name)}", *front, "---"])
        + f"\n\n# {report.base.name} with merged adapters\n\n{listed}\n\n"
        f"Base: {report.base.name} ({report.base.source}), weights sha256 `{report.base.sha256}`, "
        f"licence {licence or 'not stated'}. Stored in {report.dtype}.{rounding}\n\n"
        f"Written by sideroad {__version__}; `{PROVENANCE}` has the details.\n"
    )
