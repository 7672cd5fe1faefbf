"""Does an adapter fit a model? Everything that does not, in one error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.config import SUBTRACTED, AdapterConfig, init_name
from sideroad.copies import settle_copies
from sideroad.errors import AdapterError, did_you_mean, raise_findings
from sideroad.joining import Placed, state_without_adapters
from sideroad.kinds import ALLOWED
from sideroad.kinds.convolution import CLASSES
from sideroad.kinds.embedding import Embedding as EmbeddingKind
from sideroad.kinds.prepared import PreparedConvolution, asked
from sideroad.methods import PARTS, ROWS, START, tokens_of
from sideroad.methods.objections import objection
from sideroad.pairs import pair_shapes
from sideroad.peft_experts import order_problems
from sideroad.peft_keys import PEFT_CONVOLUTION
from sideroad.route import deltas_of
from sideroad.survey import Survey
from sideroad.tying import find_followers, without_followers
from sideroad.weights import has_trainable_bias, layer_shape

Layout = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Module path → tensor name → shape."""


def layout_of(weights: Mapping[str, Mapping[str, Tensor]]) -> Layout:
    """Return the shapes of an adapter's tensors."""
    return {path: {part: tuple(tensor.shape) for part, tensor in parts.items()} for path, parts in weights.items()}


def fit(survey: Survey, value: Adapter, name: str) -> Placed:
    """Return the adapter's tensors by the model's own paths (aliases of shared modules become their first path).

    Raises:
        AdapterError: modules that do not exist or cannot be adapted, tensors that are missing, unknown or of the
            wrong shape, layers that its targets mean but that it has no tensors for; all of them, and the base that
            the adapter says it was made for.
    """
    value, strays = settle_copies(survey, _parted(survey, value))
    value = without_followers(survey, value)
    problems: dict[tuple[str, str], list[str]] = {}
    for path, problem in strays:
        problems.setdefault((path.rpartition(".")[2], problem), []).append(path)
    placed: dict[str, Mapping[str, Tensor]] = {}
    modules: dict[str, Mapping[str, Tensor]] = {}
    layout = layout_of(value.weights)
    for path, parts in [*value.weights.items(), *value.modules.items()]:
        whole = path in value.modules
        found = (
            _whole_problems(survey, path, layout_of(value.modules)[path])
            if whole
            else [
                *_module_problems(survey, value.config, path, layout[path]),
                *_kind_problems(survey, path, layout[path], value.kinds.get(path), value.config),
            ]
        )
        for problem in found:
            problems.setdefault((path.rpartition(".")[2], problem), []).append(path)
        canonical = survey.canonical.get(path, path)
        if canonical in placed or canonical in modules:
            problems.setdefault((path, "is the same module as another path of this adapter"), []).append(path)
        (modules if whole else placed)[canonical] = parts
    for path, problem in order_problems(placed, survey.experts).items():
        problems.setdefault((path.rpartition(".")[2], problem), []).append(path)
    stacked = {path.rpartition(".")[2] for path in placed if path in survey.experts}
    for path in survey.select(value.config, []):
        # a name such as down_proj, or all-linear, may be older than adapters of experts, or of one that never means any
        if path not in placed and (path not in survey.experts or path.rpartition(".")[2] in stacked):
            key = (path.rpartition(".")[2], f"has no tensors, but targets {_shown(value.config)} mean it")
            problems.setdefault(key, []).append(path)
    findings = [_told(paths, problem) for (_, problem), paths in problems.items()]
    if not (value.weights or value.modules):
        findings.append("it has no tensors at all.")
    _raise(survey, value, name, findings)
    order = {path: index for index, path in enumerate(survey.modules)}
    placed, modules = (
        dict(sorted(found.items(), key=lambda item: order[item[0]])) for found in (placed, modules)
    )
    return Placed(placed, modules, find_followers(survey, value.config, placed, modules))


def _parted(survey: Survey, value: Adapter) -> Adapter:
    """The same adapter with the state of containers trained whole given child by child, as `Survey.whole` does."""
    modules: dict[str, Mapping[str, Tensor]] = {}
    for path, state in value.modules.items():
        inner = survey.parts(path) if path in survey.modules else [path]
        if inner == [path] or not inner:
            modules[path] = state
            continue
        for part in inner:
            below = f"{part.removeprefix(path).lstrip('.')}."
            modules[part] = {name.removeprefix(below): one for name, one in state.items() if name.startswith(below)}
    return replace(value, modules=modules)


def compare_layouts(survey: Survey, value: Adapter, name: str, present: Layout) -> dict[str, Mapping[str, Tensor]]:
    """Return the adapter's tensors by the model's paths, if they are exactly those that `present` has.

    Raises:
        AdapterError: every tensor that is missing, unknown or of another shape; what `fit` says.
    """
    settled = without_followers(survey, settle_copies(survey, _parted(survey, value))[0])
    given = layout_of({survey.canonical.get(at, at): one for at, one in {**settled.weights, **settled.modules}.items()})
    findings = []
    for path in dict.fromkeys([*present, *given]):
        here, there = present.get(path, {}), given.get(path, {})
        for part in dict.fromkeys([*here, *there]):
            if part not in there:
                findings.append(f"{path}.{part} is missing.")
            elif part not in here:
                guess = did_you_mean(path, present) if path not in present else ""
                findings.append(f"{path}.{part} is not part of the attached adapter.{guess}")
            elif here[part] != there[part]:
                findings.append(f"{path}.{part} is {list(there[part])}; needed {list(here[part])}.")
    _raise(survey, value, name, findings)
    fitted = fit(survey, value, name)
    return {**fitted.tensors, **fitted.modules}


def refuse_occupied(layers: Mapping[str, nn.Module], route: object) -> None:
    """Refuse layers that already have something called `lora`: another handle's adapters, or the model's own.

    Raises:
        AdapterError: names them all.
    """
    findings = []
    for path, layer in layers.items():
        deltas = deltas_of(layer)
        if deltas is None and hasattr(layer, "lora"):
            findings.append(f'{path} has an attribute named "lora" of its own; exclude it.')
        elif deltas is not None and deltas.route is not route:
            findings.append(f"{path} was adapted through another handle; attach to the model that was attached first.")
    raise_findings(AdapterError, "layers are taken", findings)


def _module_problems(
    survey: Survey, config: AdapterConfig, path: str, parts: Mapping[str, tuple[int, ...]]
) -> Iterable[str]:
    """Sentences (without the path) about one module of an adapter."""
    module = survey.modules.get(path)
    if module is None or not path:
        nearest = did_you_mean(path, survey.adaptable)
        yield f"does not exist in the model.{nearest}" if nearest else "does not exist in the model"
        return
    if ROWS in parts:
        yield from _row_problems(survey, config, path, parts)
        return
    start = START if init_name(config.method.init) in SUBTRACTED and parts.keys() & set(START) else ()
    needed = (*PARTS[config.method.kind], *start)
    pair = [part for part in parts if part in needed]
    unknown = [part for part in parts if part not in needed and part != "bias"]
    if unknown:
        yield f"has unknown tensors {', '.join(unknown)}; allowed: {', '.join(needed)}, bias"
    if pair and len(pair) < len(needed):
        yield f"has {', '.join(pair)} but lacks {', '.join(part for part in needed if part not in pair)}"
    if not parts:
        yield "has no tensors"
    if pair and survey.canonical[path] not in survey.adaptable:
        yield f"is a {type(module).__name__}, which cannot be adapted; allowed: {ALLOWED}"
    elif len(pair) == len(needed):
        yield from _shape_problems(config, path, module, parts)
    if "bias" in parts:
        yield from _bias_problems(module, parts["bias"])


def _shape_problems(
    config: AdapterConfig, path: str, layer: nn.Module, parts: Mapping[str, tuple[int, ...]]
) -> Iterable[str]:
    rank = max((*parts["B"], 0, 0)[1], 1)
    try:
        needed = pair_shapes(config, path, layer, rank)
    except AdapterError as error:
        yield f"has slices that do not fit: {error}"
        return
    if isinstance(layer, CLASSES) and layer.groups > 1 and parts["A"][1:2] == (layer.in_channels,):
        whole = rank if parts["A"][0] == rank else rank * layer.groups
        needed = (whole, layer.in_channels, *layer.kernel_size), needed[1]
    wanted = dict(zip("AB", needed, strict=True))
    wanted |= dict(zip(START, needed, strict=True)) if START[0] in parts else {}
    wanted |= {"magnitude": (layer_shape(layer)[0],), "E": (needed[0][0], 1)}
    for part, shape in wanted.items():
        if part in parts and parts[part] != shape:
            yield f"has {part} of shape {list(parts[part])}; the layer needs {list(shape)} for rank {rank}"


def _kind_problems(
    survey: Survey, path: str, parts: Mapping[str, tuple[int, ...]], said: str | None, config: AdapterConfig
) -> Iterable[str]:
    """Sentences about a pair that was made for another kind of layer, or computed in another way."""
    kind, layer = survey.kinds.get(survey.canonical.get(path, path)), survey.modules.get(path)
    if "A" not in parts or kind is None or layer is None:
        return
    if why := objection(config, path, layer):
        yield why.rstrip(".")
    embedding = EmbeddingKind.name
    if (said == embedding) != (kind.name == embedding):
        made, found = ("an embedding", "not one") if said == embedding else ("another kind of layer", "an embedding")
        yield f"has a pair that was made for {made}, but this {type(layer).__name__} is {found}"
    plain = not isinstance(layer, CLASSES) or (layer.padding_mode == "zeros" and set(layer.dilation) == {1})
    if said == PEFT_CONVOLUTION and not plain:
        yield (
            "has a pair of PEFT, which trains A without dilation and padding mode; this "
            f"{type(layer).__name__} has them ({layer.extra_repr()}), so the pair would act otherwise here. Train it "
            "again here, where A has the layer's geometry"
        )
    if said == PEFT_CONVOLUTION and isinstance(kind, PreparedConvolution) and asked(layer) == "prepared":
        yield (
            f"has a pair of PEFT, which trains A on the input as it comes; this {type(layer).__name__} has a forward "
            "of its own that prepares it first, so the pair would act otherwise here. Train it again here"
        )


def _row_problems(
    survey: Survey, config: AdapterConfig, path: str, parts: Mapping[str, tuple[int, ...]]
) -> Iterable[str]:
    if len(parts) > 1:
        yield f"has trained rows and also {', '.join(part for part in parts if part != ROWS)}"
    ids = tokens_of(config, path)
    findings: list[str] = []
    here = {f"re:{re.escape(path)}": ids} if ids else {}
    found = survey.rows(config.model_copy(update={"trainable_tokens": here}), findings)
    yield from (finding.rstrip(".") for finding in findings)
    if not findings and survey.canonical[path] not in found:
        yield "has trained rows, but trainable_tokens name no ids for it"
    elif not findings:
        needed = (len(ids), survey.modules[path].get_parameter("weight").shape[1])
        if parts[ROWS] != needed:
            yield f"has rows of shape {list(parts[ROWS])}; needed {list(needed)} for its {len(ids)} token ids"


def _whole_problems(survey: Survey, path: str, parts: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    """Sentences about a module trained whole: its state must be exactly the module's."""
    module = survey.modules.get(path)
    if module is None:
        yield f"does not exist in the model.{did_you_mean(path, survey.modules)}"
        return
    if why := survey.uncalled(path):
        yield why
    own = {name: tuple(tensor.shape) for name, tensor in state_without_adapters(module).items()}
    for part in dict.fromkeys([*own, *parts]):
        if part not in parts:
            yield f"lacks {part} of the {type(module).__name__} that it replaces"
        elif part not in own:
            yield f"has {part}, which a {type(module).__name__} of the model lacks"
        elif own[part] != parts[part]:
            grown = isinstance(module, nn.Embedding) or path in survey.heads
            hint = f"; call resize_token_embeddings({parts[part][0]}) first" if grown else ""
            yield f"has {part} of shape {list(parts[part])}; the model has {list(own[part])}{hint}"


def _bias_problems(module: nn.Module, shape: tuple[int, ...]) -> Iterable[str]:
    if not has_trainable_bias(module):
        yield f"has a bias in the adapter, but this {type(module).__name__} has none that can be trained"
    elif shape != tuple(module.get_parameter("bias").shape):
        yield f"has a bias of shape {list(shape)}; the layer needs {list(module.get_parameter('bias').shape)}"


def _told(paths: list[str], problem: str) -> str:
    more = f" and {len(paths) - 1} more like it ({', '.join(paths[1:])})" if len(paths) > 1 else ""
    return f"{paths[0]}{more}: {problem}".rstrip(".") + ("" if problem.endswith("?") else ".")


def _raise(survey: Survey, value: Adapter, name: str, findings: list[str]) -> None:
    if not findings:
        return
    made_for = f'made for "{value.base.name}"' if value.base and value.base.name else "made for an unknown base"
    head = (
        f'adapter "{name}" ({made_for}) does not fit this {survey.model_name}: is it an adapter for another base? '
        f"Load that base, or choose another adapter"
    )
    if len(findings) == 1:
        raise AdapterError(f"{head}.\n  - {findings[0]}")
    raise_findings(AdapterError, head, findings)


def _shown(config: AdapterConfig) -> str:
    return config.targets if isinstance(config.targets, str) else ", ".join(config.targets)
