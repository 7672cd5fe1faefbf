"""Fields of PEFT's adapter_config.json: which are mapped, which are kept, which are refused and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sideroad.errors import did_you_mean

MAPPED = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "use_rslora",
    "lora_dropout", "bias", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "init_lora_weights", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying", "target_parameters", "use_dora",
})  # fmt: skip
"""Fields that have a place in an `Adapter`."""

BIASES: Mapping[str, str] = {"none": "none", "lora_only": "adapted", "all": "all"}
"""PEFT's word for which biases are trained → ours."""

HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip
"""Task → names of heads that start at random and are therefore trained whole, named or not."""

HARMLESS: Mapping[str, Any] = {
    "peft_version": None, "auto_mapping": None, "revision": None, "fan_in_fan_out": False, "runtime_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {}, "eva_config": None,
    "corda_config": None, "lora_ga_config": None, "qalora_group_size": 16, "merge_weights": False,
    "unsloth_fixed": None, "lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06,
}  # fmt: skip
"""Fields that do not change what a finished adapter computes → the value that need not be kept."""

REFUSED: Mapping[str, str] = {
    "lora_bias": "a bias inside the pair",
    "layer_replication": "layers stacked several times",
    "alora_invocation_tokens": "activated LoRA, on from certain tokens only",
    "use_qalora": "QA-LoRA, inputs pooled in groups",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow, routing of tokens over several adapters",
    "velora_config": "VeLoRA, compressed activations",
    "kasa_config": "KaSA, which rewrites the base",
    "monteclora_config": "MonteCLoRA, random factors",
    "enable_lora": "pairs on parts of a fused layer (very old files)",
}
"""Fields that change the mathematics when set → what they are."""

TYPES_REFUSED: Mapping[str, str] = {
    "ADALORA": "pairs with singular values; files are read if init_r, lora_alpha, rank_pattern are as in PEFT",
    "LOHA": "Hadamard products", "LOKR": "Kronecker products",
    "IA3": "rescaled activations", "PREFIX_TUNING": "a trained prefix", "PROMPT_TUNING": "a soft prompt",
    "P_TUNING": "a soft prompt", "VERA": "shared random factors", "OFT": "orthogonal rotations",
    "BOFT": "orthogonal rotations", "XLORA": "a mixture of adapters", "LN_TUNING": "trained norms",
}  # fmt: skip

ONLY_NEW: Mapping[str, str] = {
    "megatron_config": "Megatron's parallel layers", "megatron_core": "Megatron's parallel layers",
    "loftq_config": "options of LoftQ", "corda_config": "options of CorDA",
    "lora_ga_config": "options of LoRA-GA", "qalora_group_size": "the group size of QA-LoRA",
    "runtime_config": "offloading while an adapter is made",
}  # fmt: skip
"""Fields that say nothing about a finished adapter, but that a new one would be made by → what they are."""

INITS: Mapping[bool | str, str] = {
    True: "kaiming", False: "random", "gaussian": "gaussian", "pissa": "pissa", "pissa_niter_16": "pissa-fast",
    "olora": "olora", "eva": "eva",
}  # fmt: skip
"""PEFT's words for the starts that a new adapter can have → ours."""

INITS_UNKNOWN: Mapping[str, str] = {
    "pissa_niter_": "PiSSA from a randomised SVD, which makes 16 iterations here: pissa_niter_16",
    "corda": "CorDA, directions of a data set", "loftq": "LoftQ, the error of quantisation",
    "lora_ga": 'LoRA-GA, the first gradients; sideroad.attach(..., batches=[...]) with LoraMethod(init="lora-ga") has '
    "it, and PeftModel.from_pretrained reads what that saves",
    "orthogonal": "orthogonal factors", "mica": "MiCA, minor singular vectors of the weight",
}  # fmt: skip
"""Starts of PEFT's that cannot be made by its words → what they are; a finished adapter may have come from some."""

_INITS_HARMLESS = ("gaussian", "eva", "orthogonal", "mica")
_INITS_REFUSED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def sift(
    fields: Mapping[str, Any], allow_unknown: tuple[str, ...] = (), *, source: str
) -> tuple[dict[str, Any], list[str]]:
    """Tell the fields to keep as they are from those that cannot be honoured.

    Args:
        fields: the whole file.
        allow_unknown: names of unknown fields to keep though they are set.
        source: the file, for messages.
    Returns:
        The harmless fields that say something, and one finding for each field refused.
    """
    kept: dict[str, Any] = {}
    findings = _type_findings(fields, source)
    known = {*MAPPED, *HARMLESS, *REFUSED}
    for name, value in fields.items():
        if name in MAPPED:
            continue
        if name in REFUSED:
            if value or (name == "alora_invocation_tokens" and value is not None):
                findings.append(
                    f"{source}: {name} is set ({shown(value)}): {REFUSED[name]}. That changes what the adapter "
                    "computes and is not supported yet"
                )
        elif name in HARMLESS:
            if value != HARMLESS[name] and value is not None:
                kept[name] = value
        elif value and name not in allow_unknown:
            findings.append(
                f"{source}: unknown field {name} is set ({shown(value)}); it may change what the adapter computes."
                f"{did_you_mean(name, known)} If it does not, {_allow(name)}"
            )
        else:
            kept[name] = value
    return kept, findings


def unsupported(fields: Mapping[str, Any]) -> list[str]:
    """List what a new adapter asks for by PEFT's fields that cannot be done, each by its name.

    Args:
        fields: a whole configuration, in PEFT's words; what is missing has its default.
    """
    findings = [
        f"{name} is set ({shown(value)}): {what}. That is not supported yet; leave it out"
        for name, what in REFUSED.items()
        if (value := fields.get(name)) or (name == "alora_invocation_tokens" and value is not None)
    ]
    findings += [
        f"{name} is set ({shown(fields[name])}): {what}, which is not supported yet; leave it out"
        for name, what in ONLY_NEW.items()
        if fields.get(name, HARMLESS[name]) not in (None, HARMLESS[name])
    ]
    init = fields.get("init_lora_weights", True)
    if can_start(init):
        return findings
    known = next((what for name, what in INITS_UNKNOWN.items() if str(init).lower().startswith(name)), None)
    words = [word for word in INITS if isinstance(word, str)]
    hint = "" if known else did_you_mean(str(init), (*words, *INITS_UNKNOWN))
    what = f" ({known}), which is not supported yet" if known else ", which is not known"
    allowed = ", ".join(["True", "False", *(f'"{word}"' for word in words)])
    return [*findings, f"init_lora_weights is {shown(init)}{what}; allowed: {allowed}.{hint}"]


def can_start(init: object) -> bool:
    """Whether a new adapter can have this value of `init_lora_weights`."""
    return isinstance(init, bool | str) and init in INITS


def init_of(fields: Mapping[str, Any], kept: dict[str, Any], source: str) -> tuple[str, list[str]]:
    """Return our name of the initialisation; one that changed the base is refused, others are noted in `kept`."""
    value = fields.get("init_lora_weights", True)
    if value is True or value is None:
        return "kaiming", []
    if value is False or (isinstance(value, str) and value.lower() in _INITS_HARMLESS):
        if value != "gaussian":
            kept["init_lora_weights"] = value
        return ("gaussian" if value == "gaussian" else "kaiming"), []
    if isinstance(value, str) and value.lower().startswith(_INITS_REFUSED):
        return "kaiming", [
            f'{source}: init_lora_weights is "{value[:60]}": that start rewrote the base model, so these tensors '
            "belong to a base that is not the published one. Save the adapter again with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=<its first state>), which converts it "
            "(not possible for loftq)"
        ]
    allowed = ("true", "false", *_INITS_HARMLESS)
    hint = did_you_mean(str(value)[:60], (*allowed, *_INITS_REFUSED))
    return "kaiming", [
        f"{source}: init_lora_weights is {shown(value)}, which is not known.{hint} Known: {', '.join(allowed)}"
    ]


def _type_findings(fields: Mapping[str, Any], source: str) -> list[str]:
    kind = fields.get("peft_type", "LORA" if "r" in fields else None)
    if kind == "LORA":
        return []
    if kind is None:
        return [f'{source} has no peft_type, so it is not the configuration of a PEFT adapter; expected "LORA"']
    what = TYPES_REFUSED.get(kind, "") if isinstance(kind, str) else ""
    hint = did_you_mean(str(kind)[:60].upper(), ["LORA"])
    return [
        f"{source}: peft_type is {shown(kind)}{f' ({what})' if what else ''}; only LORA files are read, other kinds "
        f"are not supported yet.{hint}"
    ]


def _allow(name: str) -> str:
    return f'keep it with Adapter.load(path, allow_unknown=("{name}",))'


def shown(value: object, most: int = 60) -> str:
    """Return a value as messages quote it, cut at `most` characters."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
