"""kinds/experts: stacked weights of fused experts, adapted one pair an expert."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from mixtures import CONFIGS, IDS, Own, logits, mixture
from tiny import fill, recompute_activations
from torch import Tensor, nn
from torch.nn import functional

from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdaloraMethod, AdapterConfig, DoraMethod, LoraMethod
from sideroad.errors import AdapterError, TargetError
from sideroad.kinds import kind_of
from sideroad.kinds.experts import (
    Experts,
    ExpertWeight,
    TransposedExperts,
    expert_weights,
    layer_at,
    per_expert,
    routers,
)
from sideroad.survey import Survey
from sideroad.targets import resolve
from sideroad.weights import read_dense, write_dense

RANK, ALPHA = 2, 6.0
NAMES = ("up_proj", "down_proj")
X = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
ROUTED = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])


def adapted(model: nn.Module, targets: Any = NAMES, **fields: Any) -> Attached:
    handle = attach(model, AdapterConfig(targets=targets, method=LoraMethod(rank=RANK, alpha=ALPHA), **fields), seed=0)
    fill(handle, size=0.3)
    return handle


@pytest.mark.parametrize("transposed", [False, True])
def test_the_view_is_a_layer_whose_weight_is_the_model_s_own(transposed: bool) -> None:
    model = Own(transposed=transposed)
    view = layer_at(model, "experts.up_proj")
    assert isinstance(view, ExpertWeight)
    assert type(kind_of(view)) is (TransposedExperts if transposed else Experts)
    assert view.get_parameter("weight") is model.experts.up_proj
    assert layer_at(model, "experts") is model.experts
    stacked = torch.cat([model.experts.matrix("up_proj", expert) for expert in range(3)])
    assert torch.equal(read_dense(view), stacked)
    write_dense(view, stacked * 2)
    assert torch.equal(torch.cat([model.experts.matrix("up_proj", expert) for expert in range(3)]), stacked * 2)
    assert "3, 6, 10" in repr(view).replace("10, 6", "6, 10")
    with pytest.raises(AttributeError):
        layer_at(model, "experts.other")


def test_experts_are_known_by_structure() -> None:
    model = Own()
    assert expert_weights(model.experts) == NAMES
    assert expert_weights(model) == ()
    model.experts.num_experts = 4
    assert expert_weights(model.experts) == ()
    model.experts.num_experts = 3
    model.experts.up_proj = nn.Parameter(model.experts.up_proj.to(torch.int8), requires_grad=False)
    assert expert_weights(model.experts) == ("down_proj",)
    conv = nn.Conv1d(4, 3, 2)
    conv.num_experts = 3  # type: ignore[assignment]
    assert expert_weights(nn.Conv1d(4, 3, 2)) == ()


@pytest.mark.parametrize("transposed", [False, True])
def test_every_expert_has_a_pair_of_its_own(transposed: bool) -> None:
    model, expected = Own(transposed=transposed), Own(transposed=transposed)
    handle = adapted(model)
    own = handle.parameters("default")
    for name in NAMES:
        A, B = per_expert(own[f"experts.{name}.A"].detach(), own[f"experts.{name}.B"].detach(), 3)
        for expert in range(3):
            with torch.no_grad():
                expected.experts.matrix(name, expert).add_(ALPHA / RANK * B[expert] @ A[expert])
    torch.testing.assert_close(model(X, ROUTED), expected(X, ROUTED), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(X, ROUTED), Own(transposed=transposed)(X, ROUTED))


def test_one_expert_equals_dense_layers() -> None:
    model = Own(1)
    handle = adapted(model)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down_proj(functional.gelu(self.up_proj(x)))
            return out

    dense = Dense()
    with torch.no_grad():
        for name in NAMES:
            dense.get_submodule(name).get_parameter("weight").copy_(model.experts.get_parameter(name)[0])
    other = attach(dense, AdapterConfig(targets=NAMES, method=LoraMethod(rank=RANK, alpha=ALPHA)))
    for name, parameter in other.parameters("default").items():
        parameter.data.copy_(handle.parameters("default")[f"experts.{name}"].data)
    x = X.clone().requires_grad_()
    for run in (model(x, torch.zeros(9, dtype=torch.long)), dense(x)):
        run.square().sum().backward()
    torch.testing.assert_close(model(X, torch.zeros(9, dtype=torch.long)), dense(X), rtol=1e-5, atol=1e-6)
    for name, parameter in other.parameters("default").items():
        torch.testing.assert_close(handle.parameters("default")[f"experts.{name}"].grad, parameter.grad)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_and_factors_permuted_together_change_nothing(transposed: bool) -> None:
    model, order = Own(transposed=transposed), torch.tensor([2, 0, 1])
    handle = adapted(model)
    expected = model(X, ROUTED)
    with torch.no_grad():
        for name in NAMES:
            model.experts.get_parameter(name).copy_(model.experts.get_parameter(name)[order].clone())
            for part in "AB":
                one = handle.parameters("default")[f"experts.{name}.{part}"]
                one.copy_(one.reshape(3, -1, one.shape[1])[order].flatten(0, 1))
    assert torch.equal(model(X, order.argsort()[ROUTED]), expected)


def test_an_expert_without_tokens_gets_a_gradient_of_exactly_zero() -> None:
    model = Own()
    handle = adapted(model)
    model(X, torch.where(ROUTED == 1, 2, ROUTED)).square().sum().backward()
    for name, parameter in handle.parameters("default").items():
        assert parameter.grad is not None, name
        gradient = parameter.grad.reshape(3, -1)
        assert not gradient[1].any()
        assert gradient[0].any()
        assert gradient[2].any()
    assert {name for name, one in model.named_parameters() if one.grad is not None} == {
        f"experts.lora.default.{name}.{part}" for name in NAMES for part in "AB"
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_equals_unmerged_and_unmerging_gives_the_bytes_back(name: str, dtype: torch.dtype) -> None:
    model = mixture(name).to(dtype)
    base, keys = logits(model), list(model.state_dict())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    handle = attach(model, AdapterConfig(targets=("gate_up_proj", "re:.*experts.down_proj"), method=LoraMethod(rank=2)))
    assert torch.equal(logits(model), base)
    fill(handle, size=0.2)
    changed = logits(model)
    assert not torch.equal(changed, base)
    with handle.merged():
        if dtype == torch.float32:
            torch.testing.assert_close(logits(model), changed, rtol=1e-5, atol=1e-5)
        else:  # the changed weights are rounded once more, and a token's choice of experts may turn on that
            assert torch.median((logits(model) - changed).abs()) < 0.05 * changed.abs().max()
    with handle.disabled():
        assert torch.equal(logits(model), base)
    handle.merge()
    handle.unmerge()
    assert torch.equal(logits(model), changed)
    handle.detach()
    assert list(model.state_dict()) == keys
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), base)
    assert not [path for path, module in model.named_modules() if "forward" in module.__dict__ or module._forward_hooks]
    assert attached(model) is None


def test_merge_and_unload_leaves_a_plain_model() -> None:
    model = mixture("mixtral")
    handle = adapted(model, "all-linear")
    changed, keys = logits(model), list(mixture("mixtral").state_dict())
    plain = handle.merge_and_unload()
    assert list(plain.state_dict()) == keys
    torch.testing.assert_close(logits(plain), changed, rtol=1e-5, atol=1e-5)


def test_several_adapters_act_together_with_their_weights() -> None:
    model = Own()
    handle = adapted(model)
    attach(model, AdapterConfig(targets="up_proj", method=LoraMethod(rank=3)), "second", seed=1)
    fill(handle, "second", size=0.2)
    one, two = (model(X, ROUTED), None)
    with handle.using({"default": 1.0, "second": -0.5}):
        two = model(X, ROUTED)
        with handle.merged({"default": 1.0, "second": -0.5}):
            torch.testing.assert_close(model(X, ROUTED), two, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one, two)
    handle.detach("default")
    assert [name for name in model.state_dict() if "lora" in name] == [
        "experts.lora.second.up_proj.A", "experts.lora.second.up_proj.B",
    ]  # fmt: skip
    handle.detach("second")
    assert torch.equal(model(X, ROUTED), Own()(X, ROUTED))


def test_parameters_are_counted_and_shown() -> None:
    model = mixture("qwen3_moe")
    targets = resolve(model, AdapterConfig(targets=("gate_up_proj", "down_proj"), method=LoraMethod(rank=3)))
    one = targets["model.layers.0.mlp.experts.gate_up_proj"]
    assert (one.experts, one.out_features, one.in_features, one.largest_rank) == (4, 48, 16, 16)
    assert one.shapes == ((12, 16), (192, 3))
    assert one.parameters == 3 * 4 * (16 + 48)
    handle = attach(model, AdapterConfig(targets=tuple(targets), method=LoraMethod(rank=3)))
    assert sum(p.numel() for p in handle.parameters("default").values()) == 2 * 3 * 4 * ((16 + 48) + (24 + 16))
    with pytest.raises(TargetError, match=r"\[out, in\] = \[48, 16\].* largest rank there is 16"):
        resolve(model, AdapterConfig(targets="gate_up_proj", method=LoraMethod(rank=17)))


def test_all_linear_covers_experts_and_leaves_routers() -> None:
    for name in CONFIGS:
        model = mixture(name)
        chosen = set(resolve(model, AdapterConfig(method=LoraMethod(rank=2))))
        assert {path for path in chosen if "experts" in path} == set(Survey(model).experts)
        assert len(Survey(model).experts) == 4
        assert not [path for path in chosen if path.endswith("gate") or "router" in path]
    model = mixture("qwen2_moe")
    assert routers(Survey(model).modules) == {f"model.layers.{n}.mlp.shared_expert_gate" for n in (0, 1)}
    named = resolve(model, AdapterConfig(targets="shared_expert_gate", method=LoraMethod(rank=1)))
    assert len(named) == 2


def test_a_linear_router_is_found_beside_its_experts() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.router = nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1))
            self.experts = Own().experts
            self.shared = nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.Linear(3, 6))
            self.widen = nn.Linear(6, 12)

    model = nn.ModuleDict({"block": Block()})
    assert routers(Survey(model).modules) == {"block.gate", "block.router.0"}
    chosen = resolve(model, AdapterConfig(method=LoraMethod(rank=1)))
    assert {path.removeprefix("block.") for path in chosen} == {
        "shared.0", "shared.2", "widen", "experts.up_proj", "experts.down_proj",
    }  # fmt: skip


def test_dropout_is_refused_by_name() -> None:
    model = Own()
    keys = list(model.state_dict())
    config = AdapterConfig(targets="up_proj", method=LoraMethod(rank=2, dropout=0.1))
    with pytest.raises(AdapterError, match=r"experts.up_proj is a stacked weight of fused experts.* found dropout 0.1"):
        attach(model, config)
    assert list(model.state_dict()) == keys
    assert attached(model) is None
    value = adapted(model).adapter("default")
    loose = Adapter(config.model_copy(update={"targets": NAMES}), value.weights, kinds=value.kinds)
    with pytest.raises(AdapterError, match=r"up_proj.*: is a stacked weight of fused experts.* found dropout 0.1"):
        attach(Own(), loose)


METHODS = [
    (DoraMethod(rank=2), "DoRA scales the output"),
    (AdaloraMethod(rank=2, target_rank=1), "has a pair for each of its experts, which adalora does not know"),
    (LoraMethod(rank=2, trains="B"), "which trains: B does not know"),
    (LoraMethod(rank=2, init="pissa"), "which init: pissa does not know"),
]


@pytest.mark.parametrize(("method", "words"), METHODS, ids=str)
def test_methods_and_starts_that_know_one_pair_alone_are_refused_by_name(method: Any, words: str) -> None:
    model = mixture("mixtral")
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=words) as caught:
        attach(model, AdapterConfig(method=method))
    assert "experts.gate_up_proj" in str(caught.value)
    assert list(model.state_dict()) == keys
    assert attach(model, AdapterConfig(method=method, exclude=("*.experts.*",))).names == ("default",)


def test_what_experts_cannot_have_is_refused_by_name() -> None:
    with pytest.raises(TargetError, match=r'"up_proj" means experts.up_proj, which is a stacked weight'):
        attach(Own(), AdapterConfig(targets=(), modules_to_save=("up_proj",)))
    with pytest.raises(TargetError, match=r"slices are given for experts.up_proj"):
        attach(Own(), AdapterConfig(targets="up_proj", slices={"up_proj": (True, False)}, method=LoraMethod(rank=2)))
    with pytest.raises(TargetError, match=r'(?s)target "experts" means OwnExperts .*Layers found: up_proj, down_proj'):
        attach(Own(), AdapterConfig(targets="experts"))
    model = mixture("mixtral")
    handle = adapted(model, ("q_proj", "gate_up_proj"))
    with handle.rows(["default", None]), pytest.raises(AdapterError, match=r"of fused experts \(MixtralExperts\)"):
        model(IDS)
    attach(model, AdapterConfig(targets="q_proj", method=LoraMethod(rank=2)), "attention")
    with handle.rows(["attention", None]):
        model(IDS)


def test_a_forward_of_somebody_else_is_refused() -> None:
    model = Own()
    taken = model.experts.forward
    model.experts.forward = lambda *args: taken(*args)
    with pytest.raises(AdapterError, match=r"forward of this OwnExperts was replaced by another library"):
        adapted(model)
    assert attached(model) is None


def test_experts_trained_whole_stand_beside_pairs_elsewhere() -> None:
    model = mixture("mixtral")
    expected = logits(model)
    config = AdapterConfig(targets="all-linear", modules_to_save=("layers.0.mlp.experts",), method=LoraMethod(rank=2))
    handle = attach(model, config)
    assert torch.equal(logits(model), expected)
    assert [path for path in handle.paths("default") if "experts" in path] == [
        "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.experts",
    ]  # fmt: skip
    fill(handle, size=0.05)
    changed = logits(model)
    assert not torch.equal(changed, expected)
    with handle.merged():
        torch.testing.assert_close(logits(model), changed, rtol=1e-5, atol=1e-5)
    handle.detach()
    assert torch.equal(logits(model), expected)


def test_a_value_comes_off_and_goes_on_again_and_loads_in_place() -> None:
    model = mixture("gpt_oss")
    handle = adapted(model, "all-linear")
    value, expected = handle.adapter("default"), logits(model)
    other = mixture("gpt_oss")
    again = attach(other, value)
    assert torch.equal(logits(other), expected)
    fill(again, size=0.5)
    again.load("default", value)
    assert torch.equal(logits(other), expected)
    twin = copy.deepcopy(other)
    restored = pickle.loads(pickle.dumps(other))
    other.get_parameter("model.layers.0.mlp.experts.down_proj").data.zero_()
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(restored), expected)
    rank = value.lower("model.layers.0.mlp.experts.down_proj")
    assert rank.shape == (4 * 16, 24)


def test_tensors_that_do_not_fit_are_named() -> None:
    value = adapted(Own()).adapter("default")
    with pytest.raises(AdapterError, match=r"has A of shape \[6, 6\]; the layer needs \[8, 6\] for rank 2"):
        attach(Own(4), value)
    half = {"experts.up_proj": value.weights["experts.up_proj"]}
    assert attach(Own(), Adapter(value.config, half, kinds=value.kinds)).paths("default") == ("experts.up_proj",)


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        model = mixture("qwen3_moe").train()
        if checkpointed:
            recompute_activations(model)
        handle = adapted(model, "all-linear")
        model(IDS).logits.square().mean().backward()
        found.append([one.grad for one in handle.parameters("default").values()])
    for plain, again in zip(*found, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, again)


def test_frozen_routers_and_base_get_no_gradient() -> None:
    model = mixture("mixtral").train()
    handle = adapted(model, "all-linear")
    model(IDS).logits.square().mean().backward()
    assert {id(one) for one in model.parameters() if one.grad is not None} == {
        id(one) for one in handle.parameters("default").values()
    }
    assert all(one.grad is not None and one.grad.any() for one in handle.parameters("default").values())
