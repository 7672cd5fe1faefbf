"""methods/replaced: modules trained whole, beside other adapters, merged, switched and in mixed batches."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IDS, fill, tiny_llama
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, TargetError


class Model(nn.Module):
    """Inputs, a normalisation with buffers, and a head."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = head or nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.inner(x)))
        return out


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def whole(model: nn.Module, *modules: str, name: str = "default", targets: Any = ()) -> Attached:
    config = AdapterConfig(targets=targets, modules_to_save=modules, method=LoraMethod(rank=2))
    handle = attach(model, config, name)
    fill(handle, name, 0.5)
    return handle


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in model.state_dict().items() if ".lora." not in name}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_a_copy_acts_in_the_module_s_place_and_the_module_stays() -> None:
    model = Model()
    base, head, before = model(X), model.head, bits(model)
    handle = attach(model, AdapterConfig(targets=(), modules_to_save=("head",)))
    assert torch.equal(model(X), base)
    assert list(handle.parameters("default")) == ["head.weight", "head.bias"]
    fill(handle, size=0.5)
    weight, bias = handle.parameters("default").values()
    torch.testing.assert_close(model(X), nn.functional.linear(model.norm(model.inner(X)), weight, bias))
    assert model.head is head
    assert torch.equal(model.head.weight, before["head.weight"])
    assert model.head.out_features == 3
    with handle.disabled():
        assert torch.equal(model(X), base)
    handle.activate(())
    assert torch.equal(model(X), base)
    handle.detach()
    assert torch.equal(model(X), base)
    assert equal(bits(model), before)
    assert "forward" not in model.head.__dict__
    assert not model.head._forward_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_reach_the_copy_alone() -> None:
    model = Model().train()
    handle = whole(model, "head", "norm", targets="inner")
    model(X).square().sum().backward()
    own = {id(one) for one in handle.parameters("default").values()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name


def test_buffers_of_a_normalisation_are_the_copy_s_and_merge_byte_for_byte() -> None:
    model = Model()
    before = bits(model)
    handle = whole(model, "norm", "head")
    model.train()
    for _ in range(3):
        model(X)
    model.eval()
    assert equal(bits(model), before)
    state = handle.adapter("default").modules["norm"]
    assert int(state["num_batches_tracked"]) == 3
    apart = model(X)
    handle.merge()
    assert torch.equal(model(X), apart)
    assert int(model.norm.num_batches_tracked) == 3
    assert torch.equal(model.norm.running_mean, state["running_mean"])
    with handle.disabled():
        assert equal(bits(model), before)
    handle.unmerge()
    assert equal(bits(model), before)
    assert torch.equal(model(X), apart)
    plain = handle.merge_and_unload()
    assert list(plain.state_dict()) == list(before)
    assert torch.equal(plain(X), apart)


def test_a_container_is_its_children_and_files_name_them_as_peft_does(tmp_path: Path) -> None:
    def make() -> Model:
        return Model(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))

    model = make()
    handle = whole(model, "head")
    assert handle.paths("default") == ("head.0", "head.2")
    assert model.head[0].weight.shape == (8, 8)
    expected, value = model(X), handle.adapter("default")
    value.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert again.config.modules_to_save == ("head",)
    names = [f"{path}.{name}" for path, state in again.modules.items() for name in state]
    assert names == ["head.0.bias", "head.0.weight", "head.2.bias", "head.2.weight"]
    twin = make()
    loaded = attach(twin, again)
    assert torch.equal(twin(X), expected)
    assert loaded.adapter("default").same_weights(value)
    handle.load("default", again)
    with handle.merged():
        assert torch.equal(model(X), expected)


def test_a_layer_that_stands_twice_in_a_container_is_trained_once(tmp_path: Path) -> None:
    def make() -> Model:
        layer = nn.Linear(8, 8)
        return Model(nn.Sequential(layer, nn.Tanh(), layer))

    model = make()
    handle = whole(model, "head")
    assert handle.paths("default") == ("head.0",)
    expected, value = model(X), handle.adapter("default")
    twin = make()
    twin.load_state_dict(bits(model))
    attach(twin, value)
    assert torch.equal(twin(X), expected)
    with handle.merged():
        assert torch.equal(model(X), expected)


class Head(nn.Module):
    """A head with a forward of its own around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.deep(x))


@pytest.mark.parametrize("first", ["pair", "whole"])
def test_a_copy_has_no_adapters_though_the_module_has_some_inside(first: str) -> None:
    model = Model(Head())
    base = model(X)
    for name in ("pair", "whole") if first == "pair" else ("whole", "pair"):
        handle = whole(model, *(("head",) if name == "whole" else ()), name=name,
                       targets="head.deep" if name == "pair" else ())  # fmt: skip
    assert list(model.head.lora.whole.copy.state_dict()) == ["deep.weight", "deep.bias"]
    assert list(handle.parameters("whole")) == ["head.deep.weight", "head.deep.bias"]
    with pytest.raises(AdapterError, match=r'"whole" replaces head .* and "pair" changes head.deep'):
        handle.activate(["pair", "whole"])
    outs = {}
    for name in ("pair", "whole"):
        with handle.using(name):
            outs[name] = model(X)
            with handle.merged():
                torch.testing.assert_close(model(X), outs[name])
    twin = Model(Head())
    attach(twin, handle.adapter("whole"))
    assert torch.equal(twin(X), outs["whole"])
    handle.detach("whole")
    handle.activate("pair")
    assert torch.equal(model(X), outs["pair"])
    handle.detach()
    assert torch.equal(model(X), base)


def test_a_copy_beside_a_pair_on_the_same_layer() -> None:
    model = Model()
    handle = whole(model, name="pair", targets="head")
    whole(model, "head", name="whole")
    handle.activate("whole")
    weight, bias = handle.parameters("whole").values()
    assert torch.equal(model(X), nn.functional.linear(model.norm(model.inner(X)), weight, bias))
    handle.detach("pair")
    assert torch.equal(model(X), nn.functional.linear(model.norm(model.inner(X)), weight, bias))


def test_attention_trained_whole_while_another_adapts_its_projections() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}).eval()
    x = torch.randn(3, 2, 8)

    def run() -> Tensor:
        out: Tensor = model["attention"](x, x, x)[0]
        return out

    base = run()
    handle = whole(model, name="pair", targets=("attention", "out_proj"))
    whole(model, "attention", name="whole")
    outs = []
    for name in ("pair", "whole"):
        with handle.using(name):
            outs.append(run())
            with handle.merged():
                torch.testing.assert_close(run(), outs[-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outs[0], outs[1])
    handle.detach("whole")
    handle.activate("pair")
    assert torch.equal(run(), outs[0])
    handle.detach()
    assert torch.equal(run(), base)


def test_switching_goes_between_copies() -> None:
    model = Model()
    handle = whole(model, "head", name="a")
    whole(model, "head", name="b2")
    outs = {}
    for name in ("a", "b2"):
        handle.activate(name)
        outs[name] = model(X)
    assert not torch.allclose(outs["a"], outs["b2"])
    with handle.using("a"):
        assert torch.equal(model(X), outs["a"])
    assert torch.equal(model(X), outs["b2"])
    handle.detach("b2")
    handle.activate("a")
    assert torch.equal(model(X), outs["a"])


def test_weights_and_company_that_a_copy_cannot_have_are_refused() -> None:
    model = Model(nn.Sequential(nn.Linear(8, 3)))
    handle = whole(model, "head", name="a")
    whole(model, "head", name="b2")
    whole(model, name="pair", targets="head.0")
    with pytest.raises(AdapterError, match=r'the weight of adapter "a" is 0.5, but it replaces head.0'):
        handle.activate({"a": 0.5})
    with pytest.raises(AdapterError, match=r'"a" replaces head.0 \(modules_to_save\), and "b2" changes head.0; only'):
        handle.activate(["a", "b2"])
    with pytest.raises(AdapterError, match=r'"a" replaces head.0 .* and "pair" changes head.0'):
        handle.activate(["pair", "a"])
    with pytest.raises(AdapterError, match=r'row 1: .*replaces'):
        handle.rows(["a", ["a", "pair"]]).__enter__()
    inner = whole(Model(), name="pair", targets="inner")
    whole(inner.model, "head", name="whole")
    inner.activate(["pair", "whole"])
    apart = inner.model(X)
    with inner.merged():
        torch.testing.assert_close(inner.model(X), apart)


def test_rows_of_a_batch_go_through_copies_of_their_own() -> None:
    model = Model()
    handle = whole(model, "head", name="a", targets="inner")
    whole(model, "head", name="b2")
    single = {}
    for name in ("a", "b2"):
        with handle.using(name):
            single[name] = model(X)
    with handle.disabled():
        single[""] = model(X)
    order = ["a", "", "b2", "a", ""]
    with handle.rows([name or None for name in order]):
        mixed = model(X)
    for row, name in enumerate(order):
        torch.testing.assert_close(mixed[row], single[name][row])


@pytest.mark.parametrize("twice", [lambda m: copy.deepcopy(m), lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_go_on_by_themselves(twice: Any) -> None:
    model = Model()
    whole(model, "head")
    expected = model(X)
    twin = twice(model)
    assert torch.equal(twin(X), expected)
    fill(attached(twin), size=2.0)
    assert not torch.allclose(twin(X), expected)
    attached(twin).detach()
    assert torch.equal(twin(X), Model()(X))
    assert torch.equal(model(X), expected)


def test_head_and_embedding_of_a_tied_model_part() -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    weight = model.lm_head.weight
    for name in ("lm_head", "embed_tokens"):
        handle = whole(model, name)
        apart = model(IDS).logits
        handle.merge()
        torch.testing.assert_close(model(IDS).logits, apart, rtol=1e-5, atol=1e-5)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        handle.unmerge()
        assert model.lm_head.weight is model.model.embed_tokens.weight is weight
        handle.detach()


class Loose(nn.Module):
    """A collection that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("hed",), r'modules_to_save "hed" matches no module of ModuleDict. Did you mean "head"\?'),
        (("out_proj",), "means attention.out_proj, which has a weight that its attention reads without calling it; na"),
        (("loose",), "means loose, which is a Loose without a forward; name the modules in it, or the one around it"),
        (("rate",), "means rate, which has no parameters"),
    ],
)
def test_modules_that_nothing_calls_are_refused_in_words(names: Any, words: str) -> None:
    model = nn.ModuleDict(
        {"head": nn.Linear(8, 3), "attention": nn.MultiheadAttention(8, 2), "loose": Loose(), "rate": nn.Dropout()}
    )
    with pytest.raises(TargetError, match=words):
        attach(model, AdapterConfig(targets=(), modules_to_save=names))
    assert attached(model) is None


def test_a_value_with_another_state_is_refused_tensor_by_tensor() -> None:
    value = whole(Model(), "head").adapter("default")
    with pytest.raises(AdapterError, match=r"has weight of shape \[3, 8\]; the model has \[4, 8\]"):
        attach(Model(nn.Linear(8, 4)), value)
    with pytest.raises(AdapterError, match="head: has bias, which a Linear of the model lacks"):
        attach(Model(nn.Linear(8, 3, bias=False)), value)
    with pytest.raises(AdapterError, match="head: lacks running_mean of the BatchNorm1d that it replaces"):
        attach(Model(nn.BatchNorm1d(8)), value)
