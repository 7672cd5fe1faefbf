"""Write tests/golden/peft-<version>/ with the PEFT that is installed: `python tests/golden/make.py [CASE ...]`."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from bases import BASES, WEIGHTS, build, inputs, outputs, store
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
Fields = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One adapter: its base, the fields of its LoraConfig, and the versions that can write it."""

    base: str
    fields: Fields
    since: str = "0.1.0"
    before: str = "9"
    kinds: tuple[str, ...] = field(default=())
    """What a reader must know beyond pairs on linear layers."""


CASES: dict[str, Case] = {
    # Before 0.3.0 one target alone meant enable_lora=[True, False, True]; two or more keep a plain pair.
    "names": Case("mlp", {"target_modules": ["up", "head"]}),
    "bare-suffix": Case("mlp", {"target_modules": ["p", "ead"]}, before="0.5.0"),
    "merge-weights": Case("mlp", {"target_modules": ["up", "down"], "merge_weights": True}, before="0.3.0"),
    "regex": Case("mlp", {"target_modules": r".*layers\.1\.(up|down)"}, since="0.2.0"),
    "bias-adapted": Case("mlp", {"target_modules": ["up", "head"], "bias": "lora_only"}),
    "bias-all": Case("mlp", {"target_modules": ["up", "down"], "bias": "all"}),
    "transposed": Case("fused", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, since="0.3.0"),
    "slices-qv": Case(
        "fused",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "enable_lora": [True, False, True]},
        before="0.3.0",
        kinds=("slices",),
    ),
    "slices-linear": Case("mlp", {"target_modules": ["up"]}, before="0.3.0", kinds=("slices",)),
    # Two names that mean one layer, so that enable_lora is left as it is.
    "slices-qkv": Case(
        "fused",
        {"target_modules": ["c_attn", "attn"], "fan_in_fan_out": True, "enable_lora": [True, True, True], "r": 4},
        before="0.3.0",
        kinds=("slices",),
    ),
    "whole-module": Case("mlp", {"target_modules": ["up", "down"], "modules_to_save": ["head"]}, kinds=("modules",)),
    "classifier": Case("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, kinds=("modules",)),
    "embedding": Case("words", {"target_modules": ["words", "lin"]}, since="0.3.0", kinds=("embedding",)),
    "embedding-tied": Case("gpt2", {"target_modules": ["wte"]}, since="0.4.0", kinds=("embedding",)),
    "gpt2": Case(
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
        since="0.3.0",
    ),
    "layers": Case(
        "mlp", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"}, since="0.4.0"
    ),
    "plane": Case("convolutions", {"target_modules": ["plane"]}, since="0.4.0", kinds=("conv",)),
    "patterns": Case(
        "mlp",
        {
            "target_modules": ["up", "down"],
            "rank_pattern": {"layers.0.up": 3, "down": 1},
            "alpha_pattern": {r"1\.up": 7},
        },
        since="0.6.0",
    ),
    "rslora": Case("mlp", {"target_modules": ["up", "down"], "use_rslora": True}, since="0.7.0"),
    "all-linear": Case("gpt2", {"target_modules": "all-linear"}, since="0.8.0"),
    "dora": Case("mlp", {"target_modules": ["up"], "use_dora": True}, since="0.9.0", kinds=("dora",)),
    "exclude": Case(
        "mlp", {"target_modules": ["up", "down"], "exclude_modules": r".*layers\.0\.up"}, since="0.14.0"
    ),
    "pair-bias": Case("mlp", {"target_modules": ["up"], "lora_bias": True}, since="0.14.0", kinds=("pair bias",)),
    "attention": Case("attention", {"target_modules": ["mix", "lin"]}, since="0.14.0", kinds=("attention",)),
    "all-convolutions": Case(
        "convolutions", {"target_modules": ["plane", "line", "space"]}, since="0.14.0", kinds=("conv",)
    ),
    "grouped": Case("convolutions", {"target_modules": ["grouped"]}, since="0.15.0", kinds=("conv",)),
    "tokens": Case(
        "words", {"target_modules": ["lin"], "trainable_token_indices": {"words": [5, 1]}}, since="0.15.0",
        kinds=("tokens",),
    ),
    "tokens-tied": Case(
        "gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 1]}, since="0.15.0", kinds=("tokens",)
    ),
}  # fmt: skip


def number(version: str) -> tuple[int, ...]:
    """`0.11.1` as numbers that compare."""
    return tuple(int(part) for part in version.split(".")[:3])


def configured(name: str) -> nn.Module:
    """Return a base with a configuration, which PEFT before 0.7 asks of every model."""
    base = build(name)
    if number(peft.__version__) < (0, 7) and not hasattr(base, "config"):
        base.config = transformers.PretrainedConfig()
    return base


def adapted(case: Case) -> nn.Module:
    """Return PEFT's model over the case's base, with an adapter that is not the identity."""
    fields = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, **case.fields}
    model = peft.get_peft_model(configured(case.base), peft.LoraConfig(**fields))
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.5
            if "magnitude" in name:
                parameter.data = parameter.data.abs() + 0.5
        elif parameter.requires_grad:
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=draw) * 0.5
    return model.eval()


def convert(pickle: Path) -> None:
    """Write the safetensors file beside a pickle: the lines that sideroad's refusal of the pickle prints."""
    tensors = torch.load(pickle, map_location="cpu", weights_only=True)
    target = str(pickle.with_suffix(".safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, target, metadata={"format": "pt"})


def write(name: str, case: Case, folder: Path) -> None:
    """Write one case: the adapter as PEFT saves it (a pickle converted), input and output beside it."""
    directory = folder / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    x = inputs(case.base)
    model = adapted(case)
    y = outputs(model, x)
    model.save_pretrained(directory)
    again = peft.PeftModel.from_pretrained(configured(case.base), str(directory))
    # 0.2.0 merges what it reads in eval mode, and fails at slices; nothing here depends on the mode.
    reloaded = outputs(again if number(peft.__version__) < (0, 3) else again.eval(), x)
    if not torch.allclose(reloaded, y, rtol=1e-5, atol=1e-6):
        print(f"peft {peft.__version__} {name}: what it saved is not what was trained")
    pickle = directory / "adapter_model.bin"
    if pickle.exists():
        convert(pickle)
        if name == "names" and number(peft.__version__) == (0, 1, 0):
            kept = folder / "pickle"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(directory, kept)
            (kept / "adapter_model.safetensors").unlink()
        pickle.unlink()
    (directory / "README.md").unlink(missing_ok=True)
    # One key: the order of several would change from run to run.
    about = {"case": json.dumps({"base": case.base, "kinds": case.kinds})}
    found = {"input": x, "trained": y.contiguous(), "reloaded": reloaded.contiguous()}
    save_file(found, str(directory / "expected.safetensors"), metadata=about)


def main() -> None:
    """Write every case that this version of PEFT can, or those named."""
    warnings.simplefilter("ignore")
    for base in BASES:
        if not (WEIGHTS / f"{base}.safetensors").exists():
            store(base)
    folder = HERE / f"peft-{peft.__version__}"
    for name, case in CASES.items():
        if not number(case.since) <= number(peft.__version__) < number(case.before):
            continue
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            write(name, case, Path(scratch))
            for made in Path(scratch).iterdir():
                shutil.rmtree(folder / made.name, ignore_errors=True)
                shutil.copytree(made, folder / made.name)
    made_by = {
        "python": ".".join(map(str, sys.version_info[:3])), "peft": peft.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    (folder / "made_by.json").write_text(json.dumps(made_by, indent=1) + "\n")


if __name__ == "__main__":
    main()
