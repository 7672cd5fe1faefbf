"""Tensor names of PEFT adapter files, and the module path and role that each stands for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from sideroad.errors import did_you_mean

ROOT = "base_model.model."
_LEAVES = {"lora_A.weight": "A", "lora_B.weight": "B"}
_REFUSED = {
    "lora_magnitude_vector": "a DoRA magnitude; DoRA is not supported yet",
    "lora_embedding_A": "a pair on an embedding; embeddings are not supported yet",
    "lora_embedding_B": "a pair on an embedding; embeddings are not supported yet",
    "lora_B.bias": "a bias inside the pair (lora_bias); not supported yet",
    "lora_A.bias": "a bias inside the pair; not supported",
    "lora_E": "an AdaLoRA singular value; AdaLoRA is not supported yet",
    "lora_ranknum": "an AdaLoRA rank count; AdaLoRA is not supported yet",
    "token_adapter": "rows of new tokens (trainable_token_indices); not supported yet",
    "trainable_tokens": "rows of new tokens (trainable_token_indices); not supported yet",
    "modules_to_save": "a fully trained module (modules_to_save); not supported yet",
    "base_layer.weight": (
        "a copy of the base's own weight, which PEFT adds when a head is adapted and which would replace the base's. "
        "Save the adapter again with save_pretrained(..., save_embedding_layers=False); or, if the base is the "
        'published one, leave the copy out with Adapter.load(path, allow_unknown=("base_layer.weight",))'
    ),
    "base_layer.lora_A": "a pair on a raw parameter (target_parameters); not supported yet",
    "base_layer.lora_B": "a pair on a raw parameter (target_parameters); not supported yet",
    "vera_lambda": "a VeRA vector; VeRA is not supported",
    "hada_w": "a LoHa factor; LoHa is not supported",
    "lokr_w": "a LoKr factor; LoKr is not supported",
    "ia3_l": "an IA3 vector; IA3 is not supported",
    "prompt_embeddings": "a soft prompt; prompt tuning is not supported",
}


def module_key(path: str, leaf: str, *, adapted: bool = True) -> str:
    """Return the file's name of a module's tensor.

    Args:
        leaf: `A`, `B` or `bias`.
        adapted: the module has a pair. PEFT moves such a layer's own tensors below `base_layer`, also in files.
    """
    if leaf == "bias":
        return f"{ROOT}{path}.base_layer.bias" if adapted else f"{ROOT}{path}.bias"
    return f"{ROOT}{path}.lora_{leaf}.weight"


def to_tensors(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name every tensor as PEFT's files do."""
    return {
        module_key(path, leaf, adapted="A" in leaves): tensor
        for path, leaves in weights.items()
        for leaf, tensor in leaves.items()
    }


def from_tensors(
    tensors: Mapping[str, Tensor], *, leave_out: Collection[str] = ()
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Sort a file's tensors by module; modules come in the order of their paths, numbers counted as numbers.

    Args:
        leave_out: ends of names to pass over; only `base_layer.weight`, of an adapted layer, can be left out.
    Returns:
        The weights, and one finding for each kind of name that cannot be placed.
    """
    weights: dict[str, dict[str, Tensor]] = {}
    refused: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        copied = key.removesuffix(".base_layer.weight")
        if "base_layer.weight" in leave_out and copied != key and f"{copied}.lora_A.weight" in tensors:
            continue
        placed = _place(key)
        if isinstance(placed, str):
            refused.setdefault(placed, []).append(key)
        elif placed[1] in weights.setdefault(placed[0], {}):
            refused.setdefault("a second tensor for the same place", []).append(key)
        else:
            weights[placed[0]][placed[1]] = tensor
    ordered = {
        path: {leaf: weights[path][leaf] for leaf in sorted(weights[path])}
        for path in sorted(weights, key=path_order)
        if weights[path]
    }
    return ordered, [f"{_some(keys)}: {what}" for what, keys in refused.items()]


def path_order(path: str) -> list[tuple[int, int, str]]:
    """Sort key for module paths: `layers.2` comes before `layers.10`."""
    return [(0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part) for part in path.split(".")]


def _place(key: str) -> tuple[str, str] | str:
    """Return the module path and leaf of a tensor name, or what is wrong with it."""
    if not key.startswith(ROOT):
        return (
            f'the name does not start with "{ROOT}", so this is not a file of a PEFT adapter (or one of another '
            "tool); rename the tensors or convert the file with the tool that wrote it"
        )
    rest = key.removeprefix(ROOT)
    for leaf, role in _LEAVES.items():
        if rest.endswith("." + leaf) and ".base_layer." not in rest:
            return rest.removesuffix("." + leaf), role
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
    if rest.endswith(".bias"):
        return rest.removesuffix(".bias").removesuffix(".base_layer"), "bias"
    if rest.endswith(".weight") and "lora" not in rest:
        return "a whole weight (modules_to_save, or an embedding saved beside the adapter); not supported yet"
    return f"no known tensor of a LoRA adapter.{did_you_mean('.'.join(rest.split('.')[-2:]), _LEAVES)}"


def _some(keys: Iterable[str]) -> str:
    listed = sorted(keys, key=path_order)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(name[:160] for name in listed[:3]) + more
