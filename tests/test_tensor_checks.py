"""tensor_checks: halves, shapes, types and values, in the words of files and of adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sideroad.peft_keys import BASE, EMBEDDING
from sideroad.tensor_checks import weight_findings

A, B = torch.ones(2, 6), torch.ones(4, 2)


def found(leaves: dict[str, Tensor], **options: Any) -> list[str]:
    return weight_findings({"up": leaves}, {}, **options)


@pytest.mark.parametrize(
    "leaves",
    [
        {"A": A, "B": B},
        {"A": A, "B": B, "bias": torch.ones(4)},
        {"rows": torch.ones(3, 6)},
        {"rows": torch.ones(3, 6), BASE: torch.ones(9, 6)},
        {"A": torch.ones(2, 3, 5), "B": torch.ones(4, 2, 1)},
        {"A": torch.ones(4, 3, 5, 5), "B": torch.ones(6, 2, 1, 1)},
        {"A": torch.ones(2, 3, 2, 2, 2), "B": torch.ones(4, 2, 1, 1, 1)},
        {"A": A.to(torch.float64), "B": B.bfloat16()},
    ],
)
def test_what_adapters_hold_is_fine(leaves: dict[str, Tensor]) -> None:
    assert found(leaves) == []
    assert found(leaves, kinds={}) == []


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        ({"A": A}, "up.A has no partner up.B"),
        ({"B": B}, "up.B has no partner up.A"),
        ({"A": A, "B": torch.ones(4, 3)}, "up.A [2, 6] and up.B [4, 3] have ranks 2 and 3; expected [rank, in] and"),
        ({"A": torch.ones(4, 6), "B": B}, "have ranks 4 and 2"),
        ({"A": torch.ones(3, 3, 5), "B": torch.ones(4, 2, 1)}, "have ranks 3 and 2"),
        ({"A": torch.ones(2, 3, 5), "B": B}, "have ranks 2 and 2"),
        ({"A": A, "B": B, "bias": torch.ones(5)}, "up.bias has 5 values; the layer has 4 outputs"),
        ({"A": A, "B": B, "bias": torch.ones(4, 1)}, "up.bias has shape [4, 1]; expected 1 dimensions"),
        ({"rows": torch.ones(3)}, "up.rows has shape [3]; expected 2 dimensions"),
        ({"A": torch.ones(0, 6), "B": torch.ones(4, 0)}, "up.A is empty (shape [0, 6]); it was probably saved from a"),
        ({"A": A.long(), "B": B}, "up.A has type torch.int64; allowed: float32, bfloat16, float16, float64"),
        ({"A": A, "B": B / 0}, "up.B has 8 of 8 values that are NaN or infinite; go back to an earlier checkpoint"),
        ({"A": A, "B": B, "gain": A}, "up has a tensor 'gain'; known: A, B, magnitude, bias, rows"),
        ({"bias": torch.ones(4)}, "there is no pair of lora_A and lora_B at all; an adapter needs at least one"),
    ],
)
def test_what_is_wrong_is_said(leaves: dict[str, Tensor], words: str) -> None:
    text = "\n".join(found(leaves))
    assert words in text


def test_files_are_told_of_in_their_own_names() -> None:
    assert found({"A": A}, kinds={}) == [
        "base_model.model.up.lora_A.weight has no partner base_model.model.up.lora_B.weight"
    ]
    assert "base_model.model.up.lora_embedding_A has no partner" in found({"A": A}, kinds={"up": EMBEDDING})[0]


def test_whole_modules_need_no_pair_and_their_integers_are_not_looked_at() -> None:
    state = {"weight": torch.ones(2, 2), "num_batches_tracked": torch.tensor(3), "running_mean": torch.ones(2)}
    assert weight_findings({}, {"norm": state}) == []
    (text,) = weight_findings({}, {"norm": {**state, "weight": torch.full((2,), torch.nan)}})
    assert text.startswith("norm.weight has 2 of 2 values that are NaN")
    (text,) = weight_findings({}, {"norm": {**state, "weight": torch.ones(0)}})
    assert text.startswith("norm.weight is empty")
