"""Merging and unmerging: bit-exact ways back, and the same weights as PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import both, bytes_of, config, fill, logits, quiet, relative, same, tiny_gpt2, wrapped
from tiny import tiny_llama
from torch import nn

from sideroad.errors import AdapterError, MergeError
from sideroad.peft import PeftModel, PeftModelForCausalLM


def three() -> PeftModel:
    model = wrapped(target_modules=["q_proj", "v_proj"])
    model.add_adapter("b", config(target_modules=["q_proj", "k_proj"], r=2))
    model.add_adapter("c", config(target_modules=["v_proj", "up_proj"], use_rslora=True))
    fill(model, seed=4)
    return model


CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (tiny_llama, {}),
    (tiny_llama, {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    (tiny_gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "bias": "lora_only"}),
]


@pytest.mark.parametrize(("make", "fields"), CASES)
def test_17_merged_equals_unmerged_equals_unloaded_equals_pefts(
    make: Callable[[], nn.Module], fields: dict[str, Any], tmp_path: Any
) -> None:
    ours, theirs = both(make, **fields)
    says = logits(ours)
    ours.merge_adapter()
    assert relative(logits(ours), says) <= 1e-5
    ours.unmerge_adapter()
    assert torch.equal(logits(ours), says)
    with quiet():
        expected = theirs.merge_and_unload()
    merged = ours.merge_and_unload(progressbar=True, safe_merge=True)
    assert type(merged) is type(make())
    assert relative(logits(merged), says) <= 1e-5
    assert list(merged.state_dict()) == list(expected.state_dict())
    for name, tensor in merged.state_dict().items():
        assert relative(tensor, expected.state_dict()[name]) <= 1e-5, name
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval()), logits(merged))


def test_18_and_d8_a_16_bit_base_comes_back_bit_for_bit_after_many_cycles() -> None:
    model = wrapped(lambda: tiny_llama().to(torch.bfloat16))
    before = bytes_of(model)
    for _ in range(50):
        model.merge_adapter()
        model.unmerge_adapter()
    assert same(bytes_of(model), before)
    model.merge_adapter()
    assert not same(bytes_of(model), before)


@pytest.mark.parametrize("safe", [True, False])
def test_19_a_merge_that_is_not_finite_raises_and_changes_nothing(safe: bool) -> None:
    model = three()
    model.merge_adapter(["b"])
    merged = bytes_of(model)
    bad = next(one for name, one in model.named_parameters() if ".lora.default.B" in name)
    kept = bad.detach().clone()
    bad.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match="not finite"):
        model.merge_adapter(["default"], safe_merge=safe)
    with pytest.raises(MergeError, match="not finite"):
        model.merge_and_unload(safe_merge=safe, adapter_names=["default", "c"])
    assert model.base_model.merged_adapters == ["b"]
    bad.data.copy_(kept)
    assert same(bytes_of(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), logits(three()))


def test_20_merge_one_several_all_and_switch_back() -> None:
    model = three()
    before, says = bytes_of(model), logits(model)
    for names in (["b"], ["c", "b"], ["default", "b", "c"]):
        model.merge_adapter(names)
        assert set(model.base_model.merged_adapters) == set(names)
        merged = logits(model)
        model.unmerge_adapter()
        assert same(bytes_of(model), before)
        assert torch.equal(logits(model), says)
        model.set_adapter(names, inference_mode=True)
        assert relative(merged, logits(model)) <= 1e-5
        model.set_adapter("default")


def test_21_merging_again_does_nothing() -> None:
    model = three()
    model.merge_adapter()
    once = bytes_of(model)
    model.merge_adapter()
    model.merge_adapter(["default"])
    assert same(bytes_of(model), once)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="nothing is merged"):
        model.unmerge_adapter()


def test_23_one_after_the_other_equals_all_at_once_bit_for_bit() -> None:
    model, other = three(), three()
    for name in ("default", "b", "c"):
        model.merge_adapter([name])
    other.merge_adapter(["default", "b", "c"])
    assert same(bytes_of(model), bytes_of(other))
    model.unmerge_adapter()
    assert same(bytes_of(model), bytes_of(three()))


def test_a_merge_takes_the_scale_that_was_set() -> None:
    model = three()
    model.set_scale("default", 0.25)
    says = logits(model)
    model.merge_adapter()
    assert relative(logits(model), says) <= 1e-5
    assert relative(logits(three()), says) > 1e-3


def test_merge_and_unload_takes_what_is_merged_along() -> None:
    model, other = three(), three()
    model.merge_adapter(["b"])
    other.set_adapter(["b", "default"])
    assert relative(logits(model.merge_and_unload()), logits(other)) <= 1e-5
    other = three()
    merged = three().merge_and_unload(adapter_names=["c"])
    other.set_adapter("c")
    assert relative(logits(merged), logits(other)) <= 1e-5
    model = three()
    assert same(bytes_of(model.merge_and_unload(adapter_names=[])), bytes_of(tiny_llama()))
    assert model.peft_config == {}


def test_switching_while_merged_unmerges_with_a_warning() -> None:
    model, other = three(), three()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged first"):
        model.set_adapter("b")
    other.set_adapter("b")
    assert torch.equal(logits(model), logits(other))


def test_unknown_names_and_blocks_are_refused() -> None:
    model = three()
    with pytest.raises(AdapterError, match=r'no adapter is named "bb".*Did you mean "b"'):
        model.merge_adapter(["b", "bb"])
    with model.disable_adapter(), pytest.raises(AdapterError, match="inside a"):
        model.merge_adapter()
    assert model.base_model.merged_adapters == []


def test_d10_a_tied_head_is_parted_from_the_embedding() -> None:
    model = wrapped(lambda: tiny_llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    says = logits(model)
    model.merge_adapter()
    assert relative(logits(model), says) <= 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), says)
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_the_class_of_the_task_stays() -> None:
    assert isinstance(three(), PeftModelForCausalLM)
