"""kinds/attention: projections of nn.MultiheadAttention, wherever torch calls the attention from."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import fill
from torch import Tensor, nn

from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, TargetError
from sideroad.kinds import kind_of
from sideroad.kinds.attention import InProjection, OutProjection

WIDTH, HEADS = 8, 2
BOTH = ("attention", "out_proj")


class Model(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **fields)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, query: Tensor, key: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        key = query if key is None else key
        found: tuple[Tensor, Tensor | None] = self.attention(query, key, key, **options)
        return found


def adapted(model: nn.Module, targets: Any = BOTH, **options: Any) -> Attached:
    handle = attach(model, AdapterConfig(targets=targets, method=LoraMethod(rank=2, alpha=4)), seed=0, **options)
    fill(handle, size=0.3)
    return handle


def hidden(mask: list[list[int]]) -> Tensor:
    return torch.tensor(mask).bool()


CALLS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], Any]]] = {
    "sequence first": ({}, lambda m: m(torch.randn(3, 2, WIDTH))),
    "batch first": ({"batch_first": True}, lambda m: m(torch.randn(2, 3, WIDTH))),
    "unbatched": ({}, lambda m: m(torch.randn(3, WIDTH))),
    "no bias": ({"bias": False}, lambda m: m(torch.randn(3, 2, WIDTH))),
    "key and value biases": ({"add_bias_kv": True, "add_zero_attn": True}, lambda m: m(torch.randn(3, 2, WIDTH))),
    "without weights": ({"batch_first": True}, lambda m: m(torch.randn(2, 3, WIDTH), need_weights=False)),
    "a weight for each head": ({}, lambda m: m(torch.randn(3, 2, WIDTH), average_attn_weights=False)),
    "padding": (
        {"batch_first": True},
        lambda m: m(torch.randn(2, 3, WIDTH), key_padding_mask=hidden([[0, 0, 0], [0, 1, 1]])),
    ),
    "causal": ({}, lambda m: m(torch.randn(3, 2, WIDTH), attn_mask=hidden([[0, 1, 1], [0, 0, 1], [0, 0, 0]]))),
    "cross": ({"batch_first": True}, lambda m: m(torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH))),
}


def same(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fields", "call"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("targets", [("attention",), ("out_proj",), BOTH], ids=["in", "out", "both"])
def test_adapter_equals_the_attention_with_changed_weights(fields: Any, call: Any, targets: tuple[str, ...]) -> None:
    model = Model(**fields).eval()
    expected = copy.deepcopy(model)
    handle = adapted(model, targets)
    with torch.no_grad():
        for path, name in (("attention", "in_proj_weight"), ("attention.out_proj", "weight")):
            if path in handle.paths("default"):
                A, B = (handle.parameters("default")[f"{path}.{part}"] for part in "AB")
                expected.get_submodule(path).get_parameter(name).add_(2.0 * B @ A)

    def run(one: nn.Module) -> Any:
        torch.manual_seed(1)
        return call(one)

    base = run(Model(**fields).eval())
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            same(run(model), run(expected))
            assert not torch.allclose(run(model)[0], base[0])
            with handle.merged():
                same(run(model), run(expected))
            with handle.disabled():
                same(run(model), base)


def test_gradients_reach_the_adapter_alone_and_equal_those_through_the_weight() -> None:
    model, x = Model(), torch.randn(3, 2, WIDTH)
    handle = adapted(model)
    model(x)[0].square().sum().backward()
    own = handle.parameters("default")
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in own.values())
    assert {name for name, one in model.named_parameters() if one.grad is not None} == {
        name.replace(".A", ".lora.default.A").replace(".B", ".lora.default.B") for name in own
    }
    # d loss / d B = s · d loss / d W Aᵀ
    twin = Model()
    with torch.no_grad():
        for path, name in (("attention", "in_proj_weight"), ("attention.out_proj", "weight")):
            twin.get_submodule(path).get_parameter(name).add_(2.0 * own[f"{path}.B"] @ own[f"{path}.A"])
    twin(x)[0].square().sum().backward()
    gradient = twin.attention.in_proj_weight.grad
    same(own["attention.B"].grad, 2.0 * gradient @ own["attention.A"].t())


def test_nothing_of_the_module_is_written_not_even_by_exceptions() -> None:
    model, x = Model(), torch.randn(3, 2, WIDTH)
    handle = adapted(model)
    before = {name: (id(one), one._version) for name, one in model.named_parameters()}
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 2, WIDTH), attn_mask=hidden([[0, 1]]))
    with pytest.raises(AssertionError):
        model(torch.randn(3, 2, WIDTH + 1))
    model(x)
    assert {name: (id(one), one._version) for name, one in model.named_parameters()} == before
    assert set(model.attention._parameters) == {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
                                                "in_proj_bias"}  # fmt: skip
    assert handle.names == ("default",)


def test_threads_see_the_same_output() -> None:
    model, x = Model().eval(), torch.randn(3, 2, WIDTH)
    adapted(model)
    expected, found = model(x)[0], []
    threads = [
        threading.Thread(target=lambda: found.extend(model(x)[0].detach() for _ in range(20))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(one, expected) for one in found)


def test_several_adapters_add_up_with_their_weights() -> None:
    model, x = Model().eval(), torch.randn(3, 2, WIDTH)
    handle = adapted(model)
    attach(model, AdapterConfig(targets="attention", method=LoraMethod(rank=1)), "other")
    fill(handle, "other", 0.3)
    handle.activate({"default": 0.5, "other": -1.0})
    apart = model(x)
    with handle.merged():
        same(model(x), apart)
    handle.detach("default")
    handle.activate("other")
    apart = model(x)
    with handle.merged():
        same(model(x), apart)


def test_copies_and_pickles_go_on_by_themselves() -> None:
    model, x = Model().eval(), torch.randn(3, 2, WIDTH)
    handle = adapted(model)
    expected = model(x)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x)[0], expected)
        other = attached(twin)
        other.detach()
        assert not torch.allclose(twin(x)[0], expected)
        assert "forward" not in twin.attention.__dict__
        assert not twin.attention._forward_hooks
    assert torch.equal(model(x)[0], expected)
    assert handle.names == ("default",)


def test_detach_restores_forward_hooks_and_keys_whatever_comes_off_first() -> None:
    model, x = Model().eval(), torch.randn(3, 2, WIDTH)
    keys, base = list(model.state_dict()), model(x)[0]
    handle = adapted(model, ("attention",))
    assert list(model.state_dict()) == [*keys, "attention.lora.default.A", "attention.lora.default.B"]
    attach(model, AdapterConfig(targets="out_proj", method=LoraMethod(rank=1)), "out")
    handle.detach("default")
    handle.activate("out")
    fill(handle, "out", 0.5)
    assert not torch.allclose(model(x)[0], base)
    handle.detach()
    assert torch.equal(model(x)[0], base)
    assert list(model.state_dict()) == keys
    assert "forward" not in model.attention.__dict__
    assert not model.attention._forward_hooks


def pad(module: nn.Module) -> Any:
    return module(torch.randn(3, 5, WIDTH), src_key_padding_mask=hidden(
        [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]))  # fmt: skip


OWNERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "encoder layer": (lambda: layer_of(nn.TransformerEncoderLayer), lambda m: m(torch.randn(3, 5, WIDTH))),
    "encoder layer, padded": (lambda: layer_of(nn.TransformerEncoderLayer), pad),
    "encoder": (lambda: nn.TransformerEncoder(layer_of(nn.TransformerEncoderLayer), 2),
                lambda m: m(torch.randn(3, 5, WIDTH))),
    "encoder, padded": (lambda: nn.TransformerEncoder(layer_of(nn.TransformerEncoderLayer), 2), pad),
    "decoder layer": (lambda: layer_of(nn.TransformerDecoderLayer),
                      lambda m: m(torch.randn(3, 4, WIDTH), torch.randn(3, 5, WIDTH))),
    "transformer": (lambda: nn.Transformer(WIDTH, HEADS, 1, 1, 16, batch_first=True),
                    lambda m: m(torch.randn(3, 5, WIDTH), torch.randn(3, 4, WIDTH))),
}  # fmt: skip


def layer_of(kind: type[nn.Module]) -> nn.Module:
    return kind(WIDTH, HEADS, 16, batch_first=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("trainable", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("targets", ["self_attn", "linear1", "all-linear"])
def test_inside_torch_s_own_transformers(owner: str, targets: str, trainable: bool) -> None:
    make, call = OWNERS[owner]
    torch.manual_seed(0)
    model = make().eval()
    plain = copy.deepcopy(model)

    def run(one: nn.Module) -> Tensor:
        torch.manual_seed(1)
        # padded places hold nothing that counts: zeros on torch's fast path, what was computed elsewhere
        found: Tensor = call(one)
        return found[:, :3] if "padded" in owner else found

    handle = adapted(model, targets, trainable=trainable)
    with torch.no_grad():
        unlike = run(plain)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            apart = run(model)
            assert not torch.allclose(apart, unlike, atol=1e-3)
            with handle.merged():
                same(run(model), apart)
            with handle.disabled():
                same(run(model), unlike)
    handle.detach()
    with torch.no_grad():
        assert torch.equal(run(model), unlike)
    assert str(vars(model).get("use_nested_tensor")) == str(vars(plain).get("use_nested_tensor"))


def test_nested_tensors_come_back_in_the_encoder_and_in_its_copies() -> None:
    model = nn.TransformerEncoder(layer_of(nn.TransformerEncoderLayer), 2)
    handle = adapted(model, "linear1")
    twin = copy.deepcopy(model)
    assert model.use_nested_tensor is False
    handle.detach()
    attached(twin).detach()
    assert model.use_nested_tensor is twin.use_nested_tensor is True
    off = nn.TransformerEncoder(layer_of(nn.TransformerEncoderLayer), 2, enable_nested_tensor=False)
    adapted(off, "linear1").detach()
    assert off.use_nested_tensor is False


def test_kinds_claim_the_fused_projection_and_the_output_each_for_itself() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    assert type(kind_of(attention)) is InProjection
    assert type(kind_of(attention.out_proj)) is OutProjection
    apart = nn.MultiheadAttention(WIDTH, HEADS, kdim=4, vdim=4)
    assert kind_of(apart) is None
    model = Model(kdim=4, vdim=4)
    with pytest.raises(TargetError, match=r"means MultiheadAttention \(attention\)"):
        attach(model, AdapterConfig(targets="attention"))
    handle = adapted(model, "all-linear")
    assert handle.paths("default") == ("attention.out_proj",)
    out, _ = model(torch.randn(3, 2, WIDTH), torch.randn(5, 2, 4))
    with handle.merged():
        torch.manual_seed(0)
    assert out.shape == (3, 2, WIDTH)


def test_a_dtype_below_fp32_is_rounded_as_a_merge_rounds() -> None:
    model, x = Model().eval().bfloat16(), torch.randn(3, 2, WIDTH).bfloat16()
    handle = adapted(model)
    apart = model(x)[0]
    assert apart.dtype == torch.bfloat16
    with handle.merged():
        assert torch.equal(model(x)[0], apart)


def test_dropout_is_refused_with_the_way_out() -> None:
    config = AdapterConfig(targets="attention", method=LoraMethod(rank=2, dropout=0.1))
    with pytest.raises(AdapterError, match=r"attention is a projection .* Set dropout to 0, or"):
        attach(Model(), config)
    model = Model()
    handle = adapted(model, "attention")
    value = handle.adapter("default")
    louder = replace(value, config=value.config.model_copy(update={"method": config.method}))
    before = {name: one.clone() for name, one in handle.parameters("default").items()}
    with pytest.raises(AdapterError, match=r"no branch to drop from.*found dropout 0.1"):
        handle.load("default", louder)
    assert all(torch.equal(one, before[name]) for name, one in handle.parameters("default").items())
