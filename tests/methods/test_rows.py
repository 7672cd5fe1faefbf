"""methods/rows: trained rows of embeddings and heads, tied or not, alone and beside other adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IDS, fill, tiny_llama
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, ConfigError, MergeError, TargetError
from sideroad.methods.rows import RowsDelta

TOKENS = torch.arange(10)


def add_rows(model: nn.Module, tokens: Any, name: str = "default") -> Attached:
    handle = attach(model, AdapterConfig(targets=(), trainable_tokens=tokens), name)
    fill(handle, name, 1.0)
    return handle


def add_pair(model: nn.Module, targets: Any, name: str) -> None:
    fill(attach(model, AdapterConfig(targets=targets, method=LoraMethod(rank=2)), name), name, 0.5)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 10))


def merged_equals(handle: Attached, run: Any) -> None:
    apart = run()
    with handle.merged():
        torch.testing.assert_close(run(), apart, rtol=1e-5, atol=1e-5)


def test_rows_of_an_embedding_are_looked_up_in_place_of_the_base_s() -> None:
    model = small()
    before = model[0](TOKENS)
    handle = attach(model, AdapterConfig(targets=(), trainable_tokens={"0": (7, 2)}))
    (rows,) = handle.parameters("default").values()
    assert torch.equal(rows, model[0].weight[[7, 2]])
    assert torch.equal(model[0](TOKENS), before)
    fill(handle, size=1.0)
    expected = model[0].weight.detach().clone()
    expected[[7, 2]] = rows.detach()
    torch.testing.assert_close(model[0](TOKENS), expected)
    torch.testing.assert_close(model[0](TOKENS.int().view(2, 5)), expected.view(2, 5, 6))
    with handle.merged():
        assert torch.equal(model[0].weight, expected)
    model[0](TOKENS).square().sum().backward()
    assert model[0].weight.grad is None
    torch.testing.assert_close(rows.grad, 2 * rows.detach())


def test_rows_of_a_head_move_the_logits_of_their_tokens_alone() -> None:
    model, x = small(), torch.randn(2, 3, 6)
    base = model[1](x)
    handle = add_rows(model, {"1": (9, 0)})
    (rows,) = handle.parameters("default").values()
    expected = base.clone()
    expected[..., [9, 0]] = functional.linear(x, rows, model[1].bias[[9, 0]])
    torch.testing.assert_close(model[1](x), expected)
    with handle.merged():
        assert torch.equal(model[1].weight[[9, 0]], rows)


def test_a_scaled_embedding_scales_its_rows() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 4.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    model = nn.Sequential(Scaled(10, 6))
    handle = add_rows(model, {"0": (1,)})
    (rows,) = handle.parameters("default").values()
    torch.testing.assert_close(model(torch.tensor([1])), 4 * rows)
    merged_equals(handle, lambda: model(TOKENS))


@pytest.mark.parametrize(
    "active",
    [["a", "b"], {"a": 0.5, "b": 2.0}, ["a", "pair"], ["pair", "b", "a"], {"a": -1.0}],
    ids=["two", "weights", "beside a pair", "all", "negative"],
)
def test_adapters_add_up_merged_and_unmerged(active: Any) -> None:
    model = small()
    base = model[0].weight.detach().clone()
    handle = add_rows(model, {"0": (1, 3)}, "a")
    add_rows(model, {"0": (3, 4)}, "b")
    add_pair(model, ("0",), "pair")
    handle.activate(active)
    expected = base.clone()
    weights = active if isinstance(active, dict) else dict.fromkeys(active, 1.0)
    for name, weight in weights.items():
        parts = handle.parameters(name)
        if name == "pair":
            expected += 8.0 * (parts["0.B"] @ parts["0.A"]).detach().t()
        else:
            ids = [1, 3] if name == "a" else [3, 4]
            expected[ids] += weight * (parts["0.rows"].detach() - base[ids])
    torch.testing.assert_close(model[0](TOKENS), expected, rtol=1e-5, atol=1e-5)
    with handle.merged():
        torch.testing.assert_close(model[0].weight, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model[0].weight, base)


def test_tied_head_follows_and_the_tie_survives_a_merge(tmp_path: Path) -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    weight = model.lm_head.weight
    base = model(IDS).logits
    handle = add_rows(model, {"embed_tokens": (250, 251)})
    assert handle.paths("default") == ("model.embed_tokens",)
    moved = (model(IDS).logits != base).any(1)[0]
    assert moved.nonzero().flatten().tolist() == [250, 251]
    apart = model(IDS).logits
    handle.merge()
    assert handle.untied == ()
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    torch.testing.assert_close(model(IDS).logits, apart, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    assert torch.equal(model(IDS).logits, apart)
    plain: Any = handle.merge_and_unload()
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings is True
    torch.testing.assert_close(again(IDS).logits, apart, rtol=1e-5, atol=1e-5)


def test_gradients_of_both_ends_of_a_tie_reach_the_rows() -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    handle = attach(model, AdapterConfig(targets=(), trainable_tokens={"embed_tokens": (3, 250)}))
    model(IDS).logits.square().sum().backward()
    (rows,) = handle.parameters("default").values()
    twin: Any = tiny_llama(tie_word_embeddings=True)
    twin(IDS).logits.square().sum().backward()
    torch.testing.assert_close(rows.grad, twin.lm_head.weight.grad[[3, 250]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", [["a"], {"a": 0.5}, {"a": 0.5, "b": 0.5}, ["b", "a"]])
def test_rows_named_at_either_end_of_a_tie_are_written_once(active: Any) -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    handle = add_rows(model, {"embed_tokens": (1, 3)}, "a")
    add_rows(model, {"lm_head": (3, 6)}, "b")
    handle.activate(active)
    merged_equals(handle, lambda: model(IDS).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_rows_on_a_tie_beside_a_pair_of_another_adapter(target: str) -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    weight = model.lm_head.weight
    before = weight.detach().clone()
    handle = add_rows(model, {"embed_tokens": (3, 6)}, "rows")
    add_pair(model, target, "pair")
    handle.activate(["rows", "pair"])
    apart = model(IDS).logits
    handle.merge()
    assert handle.untied == (("lm_head",) if target == "lm_head" else ("model.embed_tokens",))
    torch.testing.assert_close(model(IDS).logits, apart, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert torch.equal(weight, before)
    assert torch.equal(model(IDS).logits, apart)


def test_untied_head_and_embedding_have_rows_of_their_own_beside_pairs() -> None:
    model: Any = tiny_llama()
    tokens = {"embed_tokens": (3, 6), "lm_head": (9,)}
    handle = attach(model, AdapterConfig(targets="q_proj", trainable_tokens=tokens))
    fill(handle)
    assert {name for name in handle.parameters("default") if "rows" in name} == {
        "model.embed_tokens.rows", "lm_head.rows"
    }  # fmt: skip
    merged_equals(handle, lambda: model(IDS).logits)


def test_copies_and_files_keep_the_tie(tmp_path: Path) -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    handle = add_rows(model, {"embed_tokens": (250,)})
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, expected)
    fill(twin._sideroad_attached, size=3.0)
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.allclose(twin(IDS).logits[..., 250], expected[..., 250])
    handle.adapter("default").save(tmp_path / "a")
    again = tiny_llama(tie_word_embeddings=True)
    loaded = attach(again, Adapter.load(tmp_path / "a"))
    assert torch.equal(again(IDS).logits, expected)
    assert loaded.adapter("default").same_weights(handle.adapter("default"))
    handle.detach()
    assert torch.equal(model(IDS).logits, tiny_llama(tie_word_embeddings=True)(IDS).logits)
    assert not model.lm_head._forward_hooks


def test_loading_another_adapter_takes_over_its_token_ids() -> None:
    value = add_rows(small(), {"0": (1, 3)}).adapter("default")
    model, expected = small(), small()
    attach(expected, value)
    handle = add_rows(model, {"0": (5, 7)})
    handle.load("default", value)
    assert torch.equal(model(TOKENS), expected(TOKENS))
    assert handle.adapter("default").config.trainable_tokens == {"0": (1, 3)}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"trainable_tokens": {"0": (1, 10)}}, r"trainable_tokens \[10\] are outside the 10 rows of 0; call resize"),
        ({"trainable_tokens": {"norm": (1,)}}, r'trainable_tokens "norm" matches no module; .* embeddings \(0\) and'),
        ({"trainable_tokens": {"2": (1,)}}, r'trainable_tokens "2" means LayerNorm \(2\)'),
        ({"trainable_tokens": {"0": (1,)}, "targets": "0"}, "0 is a target, and some of its rows are in trainable_tok"),
        ({"trainable_tokens": {"0": (1,)}, "modules_to_save": ("0",)}, "0 is in modules_to_save, and some of its rows"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused_in_words(config: dict[str, Any], words: str) -> None:
    model = nn.Sequential(*small(), nn.LayerNorm(10))
    with pytest.raises(TargetError, match=words):
        attach(model, AdapterConfig(**{"targets": (), **config}))


def test_both_ends_of_a_tie_in_one_adapter_are_one_weight() -> None:
    with pytest.raises(AdapterError, match="hold one weight, so their rows are the same; name the embedding alone"):
        add_rows(tiny_llama(tie_word_embeddings=True), {"embed_tokens": (3,), "lm_head": (4,)})
    with pytest.raises((ConfigError, ValueError), match="at least one token id, and none twice"):
        AdapterConfig(targets=(), trainable_tokens={"0": (1, 1)})


def test_rows_wait_until_the_base_is_back() -> None:
    model = small()
    handle = add_rows(model, {"0": (1,)}, "a")
    value = handle.adapter("a")
    handle.merge()
    for wanted in (AdapterConfig(targets=(), trainable_tokens={"0": (2,)}), value):
        with pytest.raises(MergeError, match=r"a is merged, and this adapter starts from the base's own weights"):
            attach(model, wanted, "b")
    handle.unmerge()
    attach(model, value, "b")


def test_dtype_and_identity_below_fp32() -> None:
    model = small().bfloat16()
    before = model(TOKENS)
    handle = attach(model, AdapterConfig(targets=(), trainable_tokens={"0": (1, 2), "1": (4,)}))
    assert torch.equal(model(TOKENS), before)
    assert {one.dtype for one in handle.parameters("default").values()} == {torch.float32}
    assert "rows=2" in repr(model[0].lora.default)
    assert isinstance(model[0].lora.default, RowsDelta)
