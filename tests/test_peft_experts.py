"""peft_experts: which pair is whose, and the order of experts in files and in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError
from sideroad.peft_experts import fold_experts, order_problems, unfold_experts
from sideroad.peft_keys import Sorted, from_tensors, to_tensors
from sideroad.peft_targets import our_targets, their_parameters

ROOT = "base_model.model."
EXPERTS, OUT, IN, RANK = 3, 5, 4, 2


def pair(out: int = OUT, width: int = IN) -> dict[str, Tensor]:
    return {"A": torch.randn(EXPERTS * RANK, width), "B": torch.randn(EXPERTS * out, RANK)}


def in_file(weights: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    kinds = dict.fromkeys(weights, "experts")
    return to_tensors(fold_experts(weights, kinds), {}, kinds)


def test_b_has_the_expert_fastest_in_files_and_slowest_in_memory() -> None:
    torch.manual_seed(0)
    held = pair()
    named = in_file({"m.experts.down_proj": held})
    A, B = (named[f"{ROOT}m.experts.lora_{leaf}.weight"] for leaf in "AB")
    assert torch.equal(A, held["A"])
    assert B.shape == (OUT, RANK * EXPERTS)
    for expert in range(EXPERTS):
        # PEFT views A as [experts, rank, in] and B as [out, rank, experts]
        theirs = B.reshape(OUT, RANK, EXPERTS)[..., expert] @ A.reshape(EXPERTS, RANK, IN)[expert]
        ours = held["B"].reshape(EXPERTS, OUT, RANK)[expert] @ held["A"].reshape(EXPERTS, RANK, IN)[expert]
        assert torch.equal(theirs, ours)
    found = from_tensors(named)
    assert unfold_experts(found, ["experts.down_proj"], lambda path: RANK) == []
    assert found.kinds == {"m.experts.down_proj": "experts"}
    assert all(torch.equal(found.weights["m.experts.down_proj"][leaf], held[leaf]) for leaf in "AB")


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("down_proj", "up_proj")])
def test_the_last_parameter_s_pair_is_the_outermost(names: tuple[str, str]) -> None:
    weights = {f"m.experts.{name}": pair() for name in names}
    named = in_file(weights)
    first = next(name for name in names if name != "down_proj")
    assert torch.equal(named[f"{ROOT}m.experts.lora_A.weight"], weights["m.experts.down_proj"]["A"])
    assert torch.equal(named[f"{ROOT}m.experts.base_layer.lora_A.weight"], weights[f"m.experts.{first}"]["A"])
    found = from_tensors(named)
    assert unfold_experts(found, [f"m.experts.{name}" for name in reversed(names)], lambda path: RANK) == []
    assert {path: set(leaves) for path, leaves in found.weights.items()} == {path: {"A", "B"} for path in weights}
    assert all(torch.equal(found.weights[path]["B"], leaves["B"]) for path, leaves in weights.items())


def test_several_pairs_under_unknown_names_are_refused_both_ways() -> None:
    weights = {f"m.experts.{name}": pair() for name in ("w1", "w2")}
    with pytest.raises(AdapterError, match=r"m.experts has pairs on w1, w2, .* known for gate_up_proj, up_pr"):
        in_file(weights)
    assert list(in_file({"m.experts.w1": pair()})) == [f"{ROOT}m.experts.lora_{leaf}.weight" for leaf in "AB"]
    found = from_tensors(in_file({f"m.experts.{name}": pair() for name in ("up_proj", "down_proj")}))
    (finding,) = unfold_experts(found, ["experts.w1", "experts.w2"], lambda path: RANK)
    assert "only gate_up_proj, up_proj, down_proj are known" in finding


@pytest.mark.parametrize(
    ("targets", "rank", "words"),
    [
        ([], RANK, "2 pairs on parameters, and target_parameters name none there"),
        (["experts.down_proj"], RANK, "name down_proj there"),
        (["up_proj", "down_proj", "gate_up_proj"], RANK, "list exactly those"),
        (["up_proj", "down_proj"], 4, r"which is not made of pairs of rank 4"),
    ],
)
def test_what_cannot_be_told_is_said(targets: list[str], rank: int, words: str) -> None:
    found = from_tensors(in_file({f"m.experts.{name}": pair() for name in ("up_proj", "down_proj")}))
    findings = unfold_experts(found, targets, lambda path: rank)
    assert findings
    assert all(words in finding and "m.experts" in finding for finding in findings)


def test_the_weight_of_an_ordinary_layer_stays_a_plain_pair() -> None:
    plain = {"A": torch.randn(RANK, IN), "B": torch.randn(OUT, RANK)}
    found = Sorted(weights={"m.gate": dict(plain), "m.q": dict(plain)})
    assert unfold_experts(found, ["gate.weight"], lambda path: RANK) == []
    assert (list(found.weights), found.kinds) == (["m.gate", "m.q"], {})
    stacked = Sorted(weights={"m.experts": {"A": pair()["A"], "B": torch.randn(OUT, RANK * EXPERTS)}})
    assert unfold_experts(stacked, ["experts.weight"], lambda path: RANK) == []
    assert list(stacked.weights) == ["m.experts.weight"]


def test_a_model_with_its_weights_in_another_order_is_named() -> None:
    paths = ["m.experts.down_proj", "m.experts.up_proj"]
    assert "in the order down_proj, up_proj" in order_problems(paths, paths)["m.experts"]
    assert order_problems(paths, reversed(paths)) == {}
    assert order_problems(paths[:1], paths) == {}


def test_names_of_parameters_in_both_languages() -> None:
    stacked = [f"l.{n}.mlp.experts.{name}" for n in (0, 1) for name in ("gate_up_proj", "down_proj")]
    kinds = dict.fromkeys(stacked, "experts")
    names = ["experts.gate_up_proj", "experts.down_proj"]

    def ours(**fields: object) -> dict[str, object]:
        return our_targets(fields, ["l.0.q", *stacked], kinds)

    said = {"target_modules": ["q"], "target_parameters": names}
    assert ours(**said)["targets"] == ["q", *names]
    # a bare name would mean linear layers too
    assert ours(**{**said, "target_parameters": ["gate_up_proj", "down_proj"]})["targets"] == ["q", *stacked]
    assert ours(**said, layers_to_transform=[0])["targets"] == ["l.0.q", *stacked]
    assert their_parameters(("q", *names), stacked, limited=False) == names
    assert their_parameters("all-linear", stacked, limited=False) == ["experts.gate_up_proj", "experts.down_proj"]
    assert their_parameters("all-linear", stacked, limited=True) == stacked
    assert their_parameters(("down_proj", "gate_up_proj"), stacked, limited=False) == stacked
    assert AdapterConfig(targets=tuple(names)).targets == tuple(names)
