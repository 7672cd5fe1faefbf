"""kinds/linear: which layers it claims, and the branch in both orientations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sideroad.kinds import kind_of
from sideroad.kinds.linear import Linear, Transposed, add_product


def test_each_layer_has_one_kind_and_what_is_packed_or_inside_attention_has_none() -> None:
    assert type(kind_of(nn.Linear(4, 3))) is Linear
    assert type(kind_of(Conv1D(3, 4))) is Transposed
    assert kind_of(nn.LayerNorm(4)) is None
    assert kind_of(nn.Bilinear(2, 2, 2)) is None
    packed = nn.Linear(4, 3)
    packed.weight = nn.Parameter(torch.zeros(6, 1))
    assert kind_of(packed) is None
    packed.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    assert kind_of(packed) is None
    assert not Linear().claims(nn.MultiheadAttention(4, 2).out_proj)
    weightless = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    assert kind_of(weightless) is None


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), Conv1D(3, 4)], ids=["Linear", "Conv1D"])
def test_the_branch_is_what_the_changed_weight_adds(layer: nn.Module) -> None:
    kind = kind_of(layer)
    assert kind is not None
    assert kind.shape(layer) == (3, 4)
    assert kind.pair_shapes(layer, 2) == ((2, 4), (3, 2))
    A, B, x = torch.randn(2, 4), torch.randn(3, 2), torch.randn(5, 4)
    dense = kind.oriented(layer.get_parameter("weight")) + 0.5 * B @ A
    expected = x @ dense.t() + layer.get_parameter("bias")
    torch.testing.assert_close(kind.add(layer, x, layer(x), A, B, 0.5), expected)
    stored = kind.stored(layer, dense)
    assert stored.shape == layer.get_parameter("weight").shape
    assert torch.equal(kind.oriented(stored), dense)


def test_a_factor_for_each_row_is_a_tensor() -> None:
    y, low, B = torch.randn(2, 3, 4), torch.randn(2, 3, 2), torch.randn(4, 2)
    each = torch.rand(2, 3, 1)
    torch.testing.assert_close(add_product(y, low, B, each), y + each * (low @ B.t()))
    torch.testing.assert_close(add_product(y, low, B, 0.5), y + 0.5 * (low @ B.t()))
