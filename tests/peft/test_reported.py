"""What a PeftModel of ours says it is, and that copying, pickling and changing its class go by its real type."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import is_peft_model
from pairs import logits, wrapped
from tiny import tiny_llama
from torch import nn

from sideroad import peft as door
from sideroad.peft.reported import reported_class

TASKS = sorted(name for name in dir(door) if name.startswith("PeftModel"))


def test_it_passes_for_pefts_and_is_ours() -> None:
    model = wrapped()
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert not isinstance(model, peft.PeftModelForSeq2SeqLM)
    assert is_peft_model(model)
    assert isinstance(model, door.PeftModelForCausalLM)
    assert isinstance(model, nn.Module)
    assert type(model) is door.PeftModelForCausalLM
    assert not isinstance(model.base_model, peft.tuners.lora.LoraModel)
    assert not issubclass(type(model), peft.PeftModel)


@pytest.mark.parametrize("name", TASKS)
def test_every_class_reports_pefts_of_the_same_name(name: str) -> None:
    assert reported_class(getattr(door, name)) is getattr(peft, name)


def test_without_peft_it_is_ours_alone_and_peft_is_not_imported() -> None:
    code = (
        "import sys; sys.path[:0] = ['tests']\n"
        "from torch import nn\n"
        "from sideroad.peft import *\n"
        "model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=['0']))\n"
        "assert model.__class__ is PeftModel, model.__class__\n"
        "print(*sorted({'peft', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("way", ["pickle", "torch", "deepcopy", "copy"])
def test_a_copy_is_of_our_type_and_says_the_same(way: str) -> None:
    model = wrapped()
    if way == "torch":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other: Any = torch.load(file, weights_only=False)
    else:
        ways: dict[str, Any] = {
            "pickle": lambda one: pickle.loads(pickle.dumps(one)), "deepcopy": copy.deepcopy, "copy": copy.copy,
        }  # fmt: skip
        other = ways[way](model)
    assert type(other) is type(model)
    assert torch.equal(logits(other), logits(model))
    assert other.active_adapters == ["default"]


def test_a_class_derived_from_the_reported_one_takes_our_place_in_it() -> None:
    """FSDP2 makes such a class and assigns it; PEFT's methods must not come in that way."""
    model = wrapped()
    says = logits(model)

    class Sharded:
        def reshard(self) -> str:
            return "done"

    derived: Any = type(f"FSDP{model.__class__.__name__}", (Sharded, model.__class__), {"extra": 1})
    model.__class__ = derived
    assert isinstance(model, Sharded)
    assert model.reshard() == "done"
    assert model.extra == 1
    assert isinstance(model, door.PeftModelForCausalLM)
    assert not issubclass(type(model), peft.PeftModel)
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert torch.equal(logits(model), says)


def test_a_compiled_model_says_the_same() -> None:
    model = wrapped()
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled), logits(model), atol=1e-6)
    with model.disable_adapter():
        assert torch.allclose(logits(compiled), logits(tiny_llama()), atol=1e-6)
