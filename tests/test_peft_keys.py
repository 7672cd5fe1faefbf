"""Tensor names of PEFT's files, to module paths and back."""

from __future__ import annotations

import pytest
import torch

from sideroad.errors import AdapterError
from sideroad.peft_keys import from_tensors, module_key, path_order, to_tensors


def test_keys_survive_both_ways() -> None:
    weights = {
        "model.layers.2.q": {"A": torch.ones(1, 2), "B": torch.ones(2, 1), "bias": torch.ones(2)},
        "model.layers.10.q": {"A": torch.ones(1, 2), "B": torch.ones(2, 1)},
        "model.norm": {"bias": torch.ones(2)},
    }
    tensors = to_tensors(weights, {}, {})
    assert set(tensors) == {
        "base_model.model.model.layers.2.q.lora_A.weight", "base_model.model.model.layers.2.q.lora_B.weight",
        "base_model.model.model.layers.2.q.base_layer.bias", "base_model.model.model.layers.10.q.lora_A.weight",
        "base_model.model.model.layers.10.q.lora_B.weight", "base_model.model.model.norm.bias",
    }  # fmt: skip
    found = from_tensors(dict(sorted(tensors.items())))
    again = found.weights
    assert (found.findings, found.modules, found.kinds) == ([], {}, {})
    assert list(again) == list(weights)
    assert all(again[path][leaf] is tensor for path, leaves in weights.items() for leaf, tensor in leaves.items())


def test_older_bias_names_are_read_once() -> None:
    plain, wrapped = "base_model.model.a.q.bias", "base_model.model.a.q.base_layer.bias"
    for key in (plain, wrapped):
        assert list(from_tensors({key: torch.ones(2)}).weights) == ["a.q"]
    both = from_tensors({plain: torch.ones(2), wrapped: torch.ones(2)})
    assert "a second tensor for the same place" in both.findings[0]


def test_every_kind_of_tensor_has_its_place() -> None:
    weights = {
        "emb": {"A": torch.ones(2, 9), "B": torch.ones(4, 2)},
        "att": {"A": torch.ones(2, 4), "B": torch.ones(12, 2)},
        "att.out_proj": {"A": torch.ones(2, 4), "B": torch.ones(4, 2)},
        "wte": {"rows": torch.ones(3, 4)},
    }
    modules = {"head": {"0.weight": torch.ones(3, 4), "norm.num_batches_tracked": torch.tensor(1)}}
    kinds = {"emb": "embedding", "att.out_proj": "attention-output"}
    named = to_tensors(weights, modules, kinds)
    root = "base_model.model."
    assert set(named) == {
        f"{root}emb.lora_embedding_A", f"{root}emb.lora_embedding_B", f"{root}att.lora_A.weight",
        f"{root}att.lora_B.weight", f"{root}att.base_layer.out_proj.lora_A.weight",
        f"{root}att.base_layer.out_proj.lora_B.weight", f"{root}wte.token_adapter.trainable_tokens_delta",
        f"{root}head.0.weight", f"{root}head.norm.num_batches_tracked",
    }  # fmt: skip
    found = from_tensors(named, ["head"])
    assert (found.findings, found.kinds, found.modules) == ([], kinds, modules)
    assert {path: set(leaves) for path, leaves in found.weights.items()} == {p: set(v) for p, v in weights.items()}


def test_weights_saved_unasked_are_held_apart() -> None:
    root, one = "base_model.model.", torch.ones(3, 4)
    names = {
        "embed.weight": "embed", "head.base_layer.weight": "head", "wte.token_adapter.base_layer.weight": "wte",
    }  # fmt: skip
    found = from_tensors({root + name: one for name in names})
    assert found.findings == []
    assert {path: list(leaves) for path, leaves in found.weights.items()} == {path: ["base"] for path in names.values()}


def test_strays_beside_a_whole_module_are_passed_over() -> None:
    names = ("head.bias", "head.modules_to_save.bias", "head.original_module.bias")
    found = from_tensors({f"base_model.model.{name}": torch.ones(3) for name in names}, ["head"])
    assert (found.findings, list(found.modules), list(found.modules["head"])) == ([], ["head"], ["bias"])


def test_strays_of_the_parts_of_a_whole_module_are_passed_over() -> None:
    names = ("head.2.bias", "head.modules_to_save.default.2.bias", "head.original_module.2.bias")
    found = from_tensors({f"base_model.model.{name}": torch.ones(3) for name in names}, ["head"])
    assert (found.findings, list(found.modules["head"])) == ([], ["2.bias"])


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.q.lora_A.weight", 'does not start with "base_model.model."'),
        ("base_model.model.q.x.lora_A.default.weight", 'the adapter\'s name "default" was left'),
        ("base_model.model.q.x.lora_B.my.name.weight", r'k.replace(".my.name", "")'),
        ("base_model.model.q.x.lora_B.bias", "lora_bias"),
        ("base_model.model.q.x.lora_E", "AdaLoRA"),
        ("base_model.model.q.x.lora_a.weight", 'Did you mean "lora_'),
    ],
)
def test_tensors_that_cannot_be_placed_are_refused_by_name(key: str, words: str) -> None:
    found = from_tensors({key: torch.ones(1, 1)})
    findings = found.findings
    assert (found.weights, found.modules) == ({}, {})
    assert len(findings) == 1
    assert key in findings[0]
    assert words in findings[0]


def test_many_tensors_of_one_kind_make_one_finding() -> None:
    keys = {f"base_model.model.l.{n}.q.lora_A.default.weight": torch.ones(1, 1) for n in range(9)}
    findings = from_tensors(keys).findings
    assert len(findings) == 1
    assert "and 6 more" in findings[0]


def test_paths_are_sorted_by_number() -> None:
    assert sorted(["l.10.a", "l.2.a", "l.x", "l.2"], key=path_order) == ["l.2", "l.2.a", "l.10.a", "l.x"]
    assert module_key("a", "A") == "base_model.model.a.lora_A.weight"


def test_an_output_projection_is_halved_in_files_or_refused() -> None:
    kinds, A = {"mha.out_proj": "attention-output"}, torch.ones(1, 4)
    B = torch.tensor([[1.0], [3.0]])
    named = to_tensors({"mha.out_proj": {"A": A, "B": B}}, {}, kinds)
    key = "base_model.model.mha.base_layer.out_proj.lora_B.weight"
    assert torch.equal(named[key], B / 2)
    assert torch.equal(from_tensors(named).weights["mha.out_proj"]["B"], B)
    tiny = torch.full((2, 1), 3 * 2.0**-24, dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"mha.out_proj.B has values too small to be halved in float16"):
        to_tensors({"mha.out_proj": {"A": A.half(), "B": tiny}}, {}, kinds)


def test_an_output_projection_named_twice_counts_once() -> None:
    """PEFT's file for `target_modules=["mha", "out_proj"]`: the second pair never acts there."""
    root, A, B = "base_model.model.mha.", torch.ones(1, 4), torch.ones(4, 1)
    once = {f"{root}base_layer.out_proj.lora_A.weight": A, f"{root}base_layer.out_proj.lora_B.weight": B}
    twice = {
        f"{root}out_proj.lora_A.weight": A, f"{root}out_proj.lora_B.weight": B, f"{root}out_proj.base_layer.bias": B[0],
        f"{root}out_proj.base_layer.weight": torch.ones(4, 4),
    }  # fmt: skip
    found = from_tensors({**once, **twice})
    assert (found.findings, list(found.weights)) == ([], ["mha.out_proj"])
    assert set(found.weights["mha.out_proj"]) == {"A", "B"}
    assert from_tensors({key: twice[key] for key in list(twice)[:2]}).kinds == {}
