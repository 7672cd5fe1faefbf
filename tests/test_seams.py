"""seams: a forward taken over and given back, views that write nothing, copies without adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import fill
from torch import Tensor, nn

from sideroad.attaching import attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError
from sideroad.route import Route, deltas_of
from sideroad.seams import Seam, changed_view, close_path, live_copy, open_path, strip

RANK = LoraMethod(rank=2)


def model_of() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 8)}).eval()


def run(model: nn.ModuleDict, x: Tensor) -> Tensor:
    out: Tensor = model["head"](model["attention"](x, x, x)[0])
    return out


X = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))


def test_hooks_serve_plain_layers_and_a_forward_those_read_by_others() -> None:
    model, route = model_of(), Route()
    assert open_path(model, "head", route).handle is not None
    assert "forward" not in model["head"].__dict__
    deltas = open_path(model, "attention.out_proj", route)
    assert open_path(model, "attention.out_proj", route) is deltas
    assert deltas.handle is None
    assert isinstance(model["attention"].__dict__["forward"], Seam)
    assert deltas_of(model["attention"]) is None
    open_path(model, "attention", route)
    close_path(model, "attention.out_proj")
    assert isinstance(model["attention"].__dict__["forward"], Seam)
    close_path(model, "attention")
    close_path(model, "head")
    assert "forward" not in model["attention"].__dict__
    assert not any(module._forward_hooks for module in model.modules())
    assert list(model.state_dict()) == list(model_of().state_dict())


class Counted:
    """A forward that counts its calls, as a device hook would set it: a copy of the module has its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.calls = module, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = type(self.module).forward(self.module, x)
        return out


def test_a_forward_set_by_another_library_is_called_copied_and_put_back() -> None:
    model = model_of()
    counted = Counted(model["head"])
    model["head"].forward = counted
    expected = run(model, X)
    handle = attach(model, AdapterConfig(targets=(), modules_to_save=("head",), method=RANK))
    fill(handle)
    assert not torch.equal(run(model, X), expected)
    assert counted.calls == 1
    assert model["head"].lora.default.copy.__dict__["forward"].calls == 2
    with handle.disabled():
        assert torch.equal(run(model, X), expected)
    assert counted.calls == 2
    handle.detach()
    assert model["head"].__dict__["forward"] is counted


@pytest.mark.parametrize("inside", [False, True])
def test_a_forward_that_a_copy_would_share_is_refused(inside: bool) -> None:
    model = nn.ModuleDict({"head": nn.Linear(8, 8)})
    if inside:
        model = nn.ModuleDict({"head": nn.TransformerDecoderLayer(8, 2, 8)})
    place = model["head"].linear1 if inside else model["head"]
    plain = place.forward
    place.forward = lambda x: plain(x)
    attach(model, AdapterConfig(targets="linear2" if inside else "head", method=RANK), "pair")
    with pytest.raises(AdapterError, match="this Linear was replaced by a function that would run the original in a"):
        attach(model, AdapterConfig(targets=(), modules_to_save=("head",), method=RANK), "whole")
    assert [name for name in model.state_dict() if "whole" in name] == []


def test_an_attention_whose_forward_is_taken_is_refused_and_nothing_stays_behind() -> None:
    model = nn.ModuleDict({"one": nn.MultiheadAttention(8, 2), "two": nn.MultiheadAttention(8, 2)})
    taken = model["two"].forward
    model["two"].forward = taken
    keys = list(model.state_dict())
    with pytest.raises(AdapterError, match=r"forward of this MultiheadAttention was replaced .* attach the adap"):
        attach(model, AdapterConfig(targets=("one", "two"), method=RANK))
    assert list(model.state_dict()) == keys
    assert attached(model) is None
    assert "forward" not in model["one"].__dict__
    assert not model["one"]._forward_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    handle = attach(model, AdapterConfig(targets="one", method=RANK), "first")
    with pytest.raises(AdapterError, match="was replaced by another library"):
        attach(model, AdapterConfig(targets=("one", "two"), method=RANK), "second")
    assert handle.names == ("first",)
    assert [name for name in model.state_dict() if "second" in name] == []
    assert [name for name in model.state_dict() if "first" in name] == ["one.lora.first.A", "one.lora.first.B"]


def test_a_view_holds_the_changed_weights_and_shares_the_rest() -> None:
    model = model_of()
    handle = attach(model, AdapterConfig(targets=("attention", "out_proj"), method=RANK))
    fill(handle)
    owner = model["attention"]
    view: Any = changed_view(owner)
    assert type(view) is type(owner)
    assert view is not owner
    assert view.in_proj_bias is owner.in_proj_bias
    assert view.out_proj.bias is owner.out_proj.bias
    A, B = (handle.parameters("default")[f"attention.{part}"] for part in "AB")
    torch.testing.assert_close(view.in_proj_weight, owner.in_proj_weight + 8.0 * B @ A)
    assert "forward" not in view.__dict__
    assert owner.in_proj_weight is owner._parameters["in_proj_weight"]
    handle.activate(())
    assert changed_view(owner) is owner
    assert changed_view(model["head"]) is model["head"]


def test_live_copy_is_that_of_the_adapter_that_acts() -> None:
    model = model_of()
    attach(model, AdapterConfig(targets=(), modules_to_save=("head",), method=RANK), "a")
    attach(model, AdapterConfig(targets="head", method=RANK), "b")
    head = model["head"]
    assert live_copy(head, {"a": 1.0}) is head.lora.a.copy
    assert live_copy(head, {"b": 1.0}) is None
    assert live_copy(nn.Linear(1, 1), {"a": 1.0}) is None


def test_strip_leaves_a_plain_module() -> None:
    model = model_of()
    expected, keys = run(model, X), list(model.state_dict())
    fill(attach(model, AdapterConfig(targets=("attention", "out_proj", "head"), method=RANK)))
    attach(model, AdapterConfig(targets=(), modules_to_save=("head",), method=RANK), "whole")
    twin: Any = strip(copy.deepcopy(model))
    assert list(twin.state_dict()) == keys
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in twin.modules())
    assert torch.equal(run(twin, X), expected)


def test_batches_that_cannot_be_split_before_a_module_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            out: Tensor = self.inner(x)
            return out * scale

    model = nn.ModuleDict({"two": Two(), "attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    handle = attach(model, AdapterConfig(targets=(), modules_to_save=("two",), method=RANK), "a")
    attach(model, AdapterConfig(targets="out_proj", method=RANK), "b")
    x = torch.randn(2, 3, 8)
    with handle.rows(["a", None]):
        assert model["two"](x).shape == (2, 3, 8)
        with pytest.raises(AdapterError, match="a mixed batch cannot be split before Two: only modules trained whole"):
            model["two"](x, scale=2.0)
        assert model["attention"](x, x, x)[0].shape == (2, 3, 8)
    with handle.rows(["b", None]), pytest.raises(AdapterError, match="adapter of an attention projection"):
        model["attention"](x, x, x)


@pytest.mark.parametrize("whole", [False, True], ids=["projections", "whole"])
def test_a_forward_taken_over_compiles_and_switches(whole: bool) -> None:
    """Copies compile to one graph; the view of an attention breaks it."""
    modules = ("attention", "head") if whole else ()
    config = AdapterConfig(targets=() if whole else ("attention", "out_proj"), modules_to_save=modules, method=RANK)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = model_of().values()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.attention(x, x, x)[0])
            return out

    model = Model()
    handle = attach(model, config)
    fill(handle)
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    outs = []
    for active in ("default", ()):
        handle.activate(active)
        outs.append(model(X))
        torch.testing.assert_close(compiled(X), outs[-1])
    assert not torch.allclose(*outs)
