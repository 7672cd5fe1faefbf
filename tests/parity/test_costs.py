"""Defects of PEFT that cost time or memory (D6, D14, D16, D24 of the reference, by number and thread), as contracts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fill, tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sideroad import peft as door
from sideroad import survey
from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, DoraMethod, LoraMethod
from sideroad.methods import dora


class Counter(TorchDispatchMode):
    """Counts the operations that make a new tensor, matrix products apart."""

    def __init__(self) -> None:
        super().__init__()
        self.other = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = any(name in str(func) for name in ("mm", "matmul", "linear"))
        self.other += not product and not any(one.alias_info for one in func._schema.returns)
        return func(*args, **(kwargs or {}))


def test_d6_peft804_a_mixed_batch_costs_no_more_operations_than_its_segments() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    for index in range(8):
        handle = attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=4)), str(index))
    counts = {}
    for count in (1, 2, 4, 8):
        with handle.rows(sorted(str(index % count) for index in range(8))), torch.no_grad(), Counter() as counter:
            model(torch.ones(8, 16))
        counts[count] = counter.other
    # one split and one join for any number, and for each segment the cast or scale of its own factors
    each = [(counts[more] - counts[less]) / (more - less) for less, more in ((2, 4), (4, 8))]
    assert each[0] == each[1] <= 1
    assert counts[2] <= counts[1] + 2


def saved_bytes(run: Callable[[], Any], besides: nn.Module) -> int:
    """Bytes that a forward keeps for its backward, parameters not counted."""
    own = {one.untyped_storage().data_ptr() for one in besides.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = run()
    assert held is not None
    return sum(size for place, size in saved.items() if place not in own)


class Attention(nn.Module):
    """Three projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(256, 256, bias=False, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize("face", ["core", "door"])
def test_d14_agilerl623_projections_of_one_input_keep_that_input_once(face: str) -> None:
    model: Any = Attention()
    if face == "core":
        attach(model, AdapterConfig(targets=("q", "k", "v"), method=LoraMethod(rank=4)))
    else:
        model = door.get_peft_model(model, door.LoraConfig(r=4, target_modules=["q", "k", "v"]))
    own = {one.dtype for one in model.parameters() if one.requires_grad}
    assert own == {torch.float32}
    x = torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(lambda: model(x), model) <= 1.15 * x.nbytes


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not any(one.alias_info for one in func._schema.returns):
            made = found if isinstance(found, tuple | list) else [found]
            self.elements = max([self.elements, *(one.numel() for one in made if isinstance(one, Tensor))])
        return found


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("face", ["core", "door"])
def test_d16_peft2651_a_step_of_dora_makes_nothing_of_the_size_of_the_weight(
    face: str, dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, rank, rows = 256, 4, 8
    # a 16-bit weight is looked at in pieces of this many elements
    monkeypatch.setattr(dora, "_BLOCK", 16 * width)
    model: Any = nn.Sequential(nn.Linear(width, width, dtype=dtype))
    if face == "core":
        attach(model, AdapterConfig(targets="0", method=DoraMethod(rank=rank, dropout=dropout)))
    else:
        fields: dict[str, Any] = {"use_dora": True, "target_modules": ["0"], "lora_dropout": dropout}
        model = door.get_peft_model(model, door.LoraConfig(r=rank, **fields))
    model.train()
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    with Largest() as largest:
        model(x).square().sum().backward()
    assert largest.elements <= 16 * width < width * width
    assert x.grad is not None


@pytest.mark.parametrize("face", ["core", "door"])
def test_d24_peft3039_adding_an_adapter_touches_its_own_layers_alone(
    face: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one_layer = AdapterConfig(targets="re:model.layers.0.self_attn.q_proj", method=LoraMethod(rank=2))
    handle = attach(tiny_llama(), one_layer, "x")
    fill(handle, "x")
    handle.adapter("x").save(tmp_path / "x")
    value = Adapter.load(tmp_path / "x")

    def touched(blocks: int, present: int) -> int:
        model: Any = tiny_llama(num_hidden_layers=blocks)
        if face == "door":
            model = door.PeftModel.from_pretrained(model, tmp_path / "x", adapter_name="0")
        for index in range(face == "door", present):
            attach(model.get_base_model() if face == "door" else model, value, str(index))
        base = model.get_base_model() if face == "door" else model
        own = [(one, one._version) for one in base.parameters()]
        visits = 0
        plain = nn.Module.__getattr__

        def counted(self: nn.Module, name: str) -> Any:
            nonlocal visits
            visits += 1
            return plain(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(survey, "walk", lambda *_: pytest.fail("the whole model was walked"))
            patch.setattr(nn.Module, "__getattr__", counted)
            model.load_adapter(tmp_path / "x", "new") if face == "door" else attach(model, value, "new")
        assert all(one._version == version for one, version in own)
        return visits

    few = touched(blocks=2, present=1)
    assert touched(blocks=8, present=1) == few
    assert touched(blocks=2, present=6) == few
