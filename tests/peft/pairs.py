"""The same program with our front door and with PEFT: same base, same tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from tiny import IDS, tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sideroad import peft as door


def tiny_gpt2() -> nn.Module:
    """A random GPT-2 with biases that are not zero: Conv1D layers, 2 blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.data.uniform_(-0.1, 0.1)
    return model.eval()


QV = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
"""Fields of the configuration of most tests."""


def config(**fields: Any) -> door.LoraConfig:
    """A LoraConfig of ours over the queries and values."""
    return door.LoraConfig(**{**QV, **fields})


def fill(model: nn.Module, size: float = 0.1, seed: int = 0) -> None:
    """Give all adapters of a model random values, so that they change what it says."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            parameter.data.normal_(std=size)


def wrapped(make: Callable[[], nn.Module] = tiny_llama, **fields: Any) -> door.PeftModel:
    """A model with a filled adapter of ours."""
    model = door.get_peft_model(make(), config(**fields))
    fill(model)
    return model


def both(
    make: Callable[[], nn.Module] = tiny_llama, autocast: bool = True, **fields: Any
) -> tuple[door.PeftModel, Any]:
    """Ours and PEFT's over the same base, with the same tensors."""
    base = make()
    ours = door.get_peft_model(copy.deepcopy(base), config(**fields), autocast_adapter_dtype=autocast)
    fill(ours)
    given = {name: value for name, value in {**QV, **fields}.items() if name != "allow_unmatched"}
    with quiet():
        theirs = peft.get_peft_model(base, peft.LoraConfig(**given), autocast_adapter_dtype=autocast)
        theirs.train(ours.training)
        result = peft.set_peft_model_state_dict(theirs, door.get_peft_model_state_dict(ours))
    assert not result.unexpected_keys
    return ours, theirs


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT's warnings are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def logits(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    """What a model says, without gradients."""
    with torch.no_grad(), quiet():
        found: Tensor = model(ids, **kwargs).logits
    return found


def relative(left: Tensor, right: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((left.float() - right.float()).abs().max() / right.float().abs().max())


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names and the same bits."""
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def two(**fields: Any) -> door.PeftModel:
    """A model with adapters "default" (active) and "b", both with values."""
    model = wrapped(**fields)
    model.add_adapter("b", config(target_modules=["k_proj", "q_proj"], r=2))
    fill(model, seed=1)
    return model
