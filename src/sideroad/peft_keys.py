"""Tensor names of PEFT adapter files, and the module path and role that each stands for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sideroad.errors import AdapterError, did_you_mean

ROOT = "base_model.model."
EMBEDDING = "embedding"
"""Kind of a path whose pair PEFT names `lora_embedding_A`, `lora_embedding_B`."""
OUTPUT = "attention-output"
"""Kind of the output projection in `nn.MultiheadAttention`, whose pair PEFT names `<attention>.base_layer.out_proj`."""
PEFT_CONVOLUTION = "peft-convolution"
"""Kind of a path whose pair on a convolution PEFT has trained: its A knows neither dilation nor padding mode."""
TWICE = 2
"""How often PEFT (measured up to 0.21.2) adds the change of such an output projection. In memory B holds what acts, so
B is doubled on reading and halved on writing; files mean the same here and there. That is exact but for the smallest
and largest numbers of fp16, which are refused."""
EXPERTS = "experts"
"""Kind of a path that is a stacked weight of fused experts, whose pairs files hold otherwise (`peft_experts.py`)."""
BASE = "base"
"""Leaf that holds a whole weight which PEFT saved unasked: of an embedding or head, or of a layer beside its pair.
Attaching compares it with the base: equal, it is dropped; different, it replaces the layer's or is refused."""

_LEAVES = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}  # fmt: skip
_STRAYS = (".original_module.", ".modules_to_save.")
"""Marks of copies that PEFT writes beside what counts (bias "all" with modules_to_save), also of a module's parts."""
_ATTENTION_OUTPUT = re.compile(
    r"(?:(?P<owner>.+)\.)?base_layer\.out_proj\.(?:lora_(?P<leaf>[AB])\.weight|base_layer\.bias)"
)
_PARAMETER = re.compile(r"(?:\.base_layer)+\.(?P<leaf>lora_[AB]\.weight)$")
"""The end of a pair's name that lies deeper than another one of its module: pairs on parameters (`peft_experts.py`)."""
_REFUSED = {
    "lora_B.bias": "a bias inside the pair (lora_bias); not supported yet",
    "lora_A.bias": "a bias inside the pair; not supported",
    "lora_E": "an AdaLoRA singular value without its pair, or in a file whose peft_type is not ADALORA",
    "lora_ranknum": "an AdaLoRA rank count, which its files do not hold",
    "vera_lambda": "a VeRA vector; VeRA is not supported",
    "hada_w": "a LoHa factor; LoHa is not supported",
    "lokr_w": "a LoKr factor; LoKr is not supported",
    "ia3_l": "an IA3 vector; IA3 is not supported",
    "prompt_embeddings": "a soft prompt; prompt tuning is not supported",
}
_OF_EMBEDDING = "the DoRA magnitude of an embedding; DoRA on embeddings is not supported"


@dataclass
class Sorted:
    """A file's tensors by module.

    Args:
        weights: layer path → leaf → tensor.
        modules: path of a whole module → its state.
        kinds: path → kind, of layers whose tensors have names of their own.
        findings: one for each kind of name that cannot be placed.
    """

    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def module_key(path: str, leaf: str, *, adapted: bool = True, kind: str | None = None) -> str:
    """Return the file's name of a module's tensor.

    Args:
        leaf: `A`, `B`, `magnitude`, `bias` or `rows`.
        adapted: the module has a pair. PEFT moves such a layer's own tensors below `base_layer`, also in files.
        kind: of the layer, where its tensors have names of their own.
    """
    if kind == OUTPUT and adapted:
        parent, _, name = path.rpartition(".")
        path = f"{parent}.base_layer.{name}" if parent else f"base_layer.{name}"
    if leaf == "bias":
        return f"{ROOT}{path}.base_layer.bias" if adapted else f"{ROOT}{path}.bias"
    if leaf == BASE:
        return f"{ROOT}{path}.base_layer.weight" if adapted else f"{ROOT}{path}.weight"
    if leaf == "rows":
        return f"{ROOT}{path}.token_adapter.trainable_tokens_delta"
    if leaf == "magnitude":
        return f"{ROOT}{path}.lora_magnitude_vector"
    if kind == EMBEDDING:
        return f"{ROOT}{path}.lora_embedding_{leaf}"
    return f"{ROOT}{path}.lora_{leaf}.weight"


def to_tensors(
    weights: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, Mapping[str, Tensor]],
    kinds: Mapping[str, str],
) -> dict[str, Tensor]:
    """Name every tensor as PEFT's files do."""
    named = {
        module_key(path, leaf, adapted="A" in leaves, kind=kinds.get(path)): (
            _halved(path, tensor)
            if (kinds.get(path), leaf) == (OUTPUT, "B")
            else _beside_places(tensor, leaves["A"])
            if leaf == "magnitude"
            else tensor
        )
        for path, leaves in weights.items()
        for leaf, tensor in leaves.items()
        if leaf != BASE or "A" not in leaves
    }
    whole = {f"{ROOT}{path}.{name}": tensor for path, state in modules.items() for name, tensor in state.items()}
    return named | whole


def _beside_places(magnitude: Tensor, A: Tensor) -> Tensor:
    """A magnitude [out] as files hold it: of a convolution [1, out, 1, ...]."""
    return magnitude if A.ndim == 2 else magnitude.reshape(1, -1, *[1] * (A.ndim - 2))


def _halved(path: str, B: Tensor) -> Tensor:
    half = B / TWICE
    if not torch.equal(half * TWICE, B):
        raise AdapterError(
            f"{path}.B has values too small to be halved in {str(B.dtype).removeprefix('torch.')}, as PEFT's files "
            "hold an attention's output projection; store the adapter in float32."
        )
    return half


def from_tensors(tensors: Mapping[str, Tensor], saved: Collection[str] = ()) -> Sorted:
    """Sort a file's tensors by module; modules come in the order of their paths, numbers counted as numbers.

    A pair that lies deeper than another in one module keeps `.base_layer` at the end of its path; what it means is for
    `peft_experts.unfold_experts` to say.

    Args:
        saved: names of `modules_to_save`; a module path that ends in one is a module trained whole.
    """
    found = Sorted()
    refused: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        if any(mark in key for mark in _STRAYS) or _counts_for_nothing(key, tensors):
            continue
        placed = _place(key, saved)
        if isinstance(placed, str):
            refused.setdefault(placed, []).append(key)
            continue
        where = (found.modules if placed.whole else found.weights).setdefault(placed.path, {})
        if placed.leaf in where:
            refused.setdefault("a second tensor for the same place", []).append(key)
        tensor = tensor.reshape(-1) if placed.leaf == "magnitude" and not placed.whole else tensor
        where[placed.leaf] = tensor * TWICE if (placed.kind, placed.leaf) == (OUTPUT, "B") else tensor
        if placed.kind:
            found.kinds[placed.path] = placed.kind
    for path, kind in found.kinds.items():
        if kind == EMBEDDING and found.weights.get(path, {}).pop("magnitude", None) is not None:
            refused.setdefault(_OF_EMBEDDING, []).append(module_key(path, "magnitude"))
    found.findings = [f"{_some(keys)}: {what}" for what, keys in refused.items()]
    found.weights, found.modules = (
        {path: {leaf: state[path][leaf] for leaf in sorted(state[path])} for path in sorted(state, key=path_order)}
        for state in (found.weights, found.modules)
    )
    return found


def path_order(path: str) -> list[tuple[int, int, str]]:
    """Sort key for module paths: `layers.2` comes before `layers.10`."""
    return [_part_order(part) for part in path.split(".")]


def _part_order(part: str) -> tuple[int, int, str]:
    if not (part.isdecimal() and part.isascii()):
        return 1, 0, part
    # by length, then by digits: int() refuses numbers of thousands of digits
    digits = part.lstrip("0")
    return 0, len(digits), digits


def _counts_for_nothing(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether PEFT has written a tensor of an attention's output projection a second time, being told both names."""
    owner, mark, _ = key.rpartition(".out_proj.")
    return bool(mark) and not owner.endswith(".base_layer") and f"{owner}.base_layer.out_proj.lora_A.weight" in tensors


@dataclass(frozen=True)
class _Place:
    path: str
    leaf: str
    kind: str | None = None
    whole: bool = False


def _place(key: str, saved: Collection[str]) -> _Place | str:
    """Return where a tensor belongs, or what is wrong with its name."""
    if not key.startswith(ROOT):
        return (
            f'the name does not start with "{ROOT}", so this is not a file of a PEFT adapter (or one of another '
            "tool); rename the tensors or convert the file with the tool that wrote it"
        )
    rest = key.removeprefix(ROOT)
    module = _saved_module(rest, saved)
    if module:
        return _Place(module, rest.removeprefix(f"{module}."), whole=True)
    inner = _ATTENTION_OUTPUT.fullmatch(rest)
    if inner:
        owner = f"{inner['owner']}." if inner["owner"] else ""
        return _Place(f"{owner}out_proj", inner["leaf"] or "bias", OUTPUT)
    for leaf, role in _LEAVES.items():
        if rest.endswith("." + leaf) and ".base_layer." not in _PARAMETER.sub(r".\g<leaf>", rest):
            return _Place(rest.removesuffix("." + leaf), role, EMBEDDING if "embedding" in leaf else None)
    leftover = re.search(r"\.lora_(?:embedding_)?[AB]\.(?P<name>.+)\.weight$|\.lora_[AB]\.(?P<bare>[^.]+)$", key)
    if leftover and (leftover["name"] or leftover["bare"]) not in ("weight", "bias"):
        name = leftover["name"] or leftover["bare"]
        return (
            f'the adapter\'s name "{name}" was left in the tensor names, so every reader would skip them. Mend the '
            "file: from safetensors.torch import load_file, save_file; "
            f'save_file({{k.replace(".{name}", ""): v for k, v in load_file(p).items()}}, p, '
            'metadata={"format": "pt"})'
        )
    for mark, what in _REFUSED.items():
        if mark in rest:
            return what
    if rest.endswith((".base_layer.weight", ".token_adapter.base_layer.weight")):
        return _Place(rest.removesuffix(".weight").removesuffix(".base_layer").removesuffix(".token_adapter"), BASE)
    if rest.endswith(".bias"):
        return _Place(rest.removesuffix(".bias").removesuffix(".base_layer"), "bias")
    if rest.endswith(".weight") and "lora" not in rest:
        return _Place(rest.removesuffix(".weight"), BASE)
    return f"no known tensor of a LoRA adapter.{did_you_mean('.'.join(rest.split('.')[-2:]), _LEAVES)}"


def _saved_module(rest: str, saved: Collection[str]) -> str | None:
    """The shortest leading path that ends in one of the names; what follows it names a tensor of that module.

    PEFT looks at letters, not at dots: `norm` means `input_layernorm` too.
    """
    if ".lora_" in rest:
        return None
    parts = rest.split(".")
    leading = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((path for path in leading if any(path.endswith(name) for name in saved)), None)


def _some(keys: Iterable[str]) -> str:
    listed = sorted(keys, key=path_order)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(name[:160] for name in listed[:3]) + more
