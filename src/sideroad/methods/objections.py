"""Which methods cannot act on which layers, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from sideroad.config import FROM_DATA, FROM_WEIGHT, AdapterConfig, PairSettings, init_name
from sideroad.kinds import Kind, kind_of
from sideroad.kinds.convolution import CLASSES
from sideroad.kinds.experts import Experts
from sideroad.pairs import slices_of

_PROJECTION = "is a projection of nn.MultiheadAttention, which reads its weight"
_EXPERTS = "is a stacked weight of fused experts, whose forward reads it"


def objection(config: AdapterConfig, path: str, layer: nn.Module) -> str | None:
    """Say why a method cannot act on a layer, after the layer's path; None if it can."""
    kind, method = kind_of(layer), config.method
    if kind is None:
        return None
    if kind.seam == "owner" and (why := _read_by_owner(method, kind)):
        return why
    if isinstance(layer, nn.Embedding) and (why := _looked_up(method)):
        return why
    if (parts := _parts(config, path, layer, kind)) and (what := _beyond_lora(method)):
        way = "Exclude it (exclude: ['*.experts.*'])" if parts == "experts" else "Exclude it"
        return f"has a pair for each of its {parts}, which {what} does not know. {way}, or use plain LoRA"
    if init_name(method.init) in FROM_DATA and (not kind.linear or kind.seam == "owner"):
        return f"is a {type(layer).__name__}; init: {init_name(method.init)} looks at linear layers only. Exclude it"
    return None


def objections(config: AdapterConfig, targets: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return a sentence for every layer that the method cannot act on.

    Args:
        modules: path → layer, of all targets.
    """
    return [f"{path} {why}." for path in targets if (why := objection(config, path, modules[path]))]


def _read_by_owner(method: PairSettings, kind: Kind) -> str | None:
    """Where the change is in the weight, there is neither a branch to drop from nor an output to scale."""
    what = _EXPERTS if isinstance(kind, Experts) else _PROJECTION
    if method.dropout:
        return (
            f"{what}, so there is no branch to drop from; found dropout {method.dropout}. Set dropout to 0, or leave "
            f"{'the experts' if isinstance(kind, Experts) else 'the attention'} out with exclude"
        )
    return f"{what}; DoRA scales the output of a layer that is called. Exclude it" if method.variant == "dora" else None


def _looked_up(method: PairSettings) -> str | None:
    if method.variant == "dora":
        return "is an embedding, which has no rows that outputs are made of: DoRA cannot act on it. Exclude it"
    if method.variant == "lora-fa":
        return "is an embedding, whose A is zero at the start: trains: B cannot act on it. Exclude it"
    return None


def _parts(config: AdapterConfig, path: str, layer: nn.Module, kind: Kind) -> str | None:
    """What a layer has several pairs for, if it has."""
    if isinstance(kind, Experts):
        return "experts"
    if slices_of(config, path) is not None:
        return "slices"
    return "groups" if isinstance(layer, CLASSES) and layer.groups > 1 else None


def _beyond_lora(method: PairSettings) -> str | None:
    """What of a method is more than plain LoRA, in the words of a recipe."""
    if method.variant != "lora":
        return {"lora-fa": "trains: B"}.get(method.variant, method.variant)
    named = init_name(method.init)
    return f"init: {named}" if named in (*FROM_WEIGHT, *FROM_DATA) else None
