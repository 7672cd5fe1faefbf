"""PEFT's names that are not in this package, and why; light, since it is asked when a name is imported."""

from __future__ import annotations

from collections.abc import Mapping

LATER: Mapping[str, str] = {
    **dict.fromkeys(("VeraConfig", "RandLoraConfig", "LoHaConfig", "LoKrConfig"), "other methods"),
    **dict.fromkeys(("IA3Config", "OFTConfig", "BOFTConfig", "LNTuningConfig", "FourierFTConfig"), "other methods"),
    **dict.fromkeys(("PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"), "soft prompts"),
    **dict.fromkeys(("PeftMixedModel", "XLoraConfig"), "several kinds at once"),
    **dict.fromkeys(("LoftQConfig", "CordaConfig"), "these starts"),
    "LoraRuntimeConfig": "offloading",
}
"""PEFT's names that are not here → what they are about."""

ELSEWHERE: Mapping[str, str] = {
    "AdaLoraConfig": "AdaloraMethod of sideroad.config, in a recipe; files of PEFT's AdaLoRA are read",
    **dict.fromkeys(
        ("LoraGAConfig", "preprocess_loraga"), 'LoraMethod(init="lora-ga") with sideroad.attach(..., batches=[...])'
    ),
    "get_eva_state_dict": "initialize_lora_eva_weights(model, dataloader), which finds the start and sets it",
}
"""PEFT's names that are not here → what does the same."""


def refuse_name(name: str) -> None:
    """Raise ImportError, with the reason, for a name of PEFT's that is not here; do nothing for others."""
    if name in ELSEWHERE:
        raise ImportError(f"{name} is not in sideroad.peft; what does it is {ELSEWHERE[name]}.")
    if name in LATER:
        raise ImportError(
            f"{name} is not in sideroad.peft: {LATER[name]} are not supported yet. LoraConfig is; for the others keep "
            "peft beside it (docs/migrating-from-peft.md)."
        )
