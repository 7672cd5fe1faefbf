"""weights: every adaptable layer reads and writes as [out, in]."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from sideroad.errors import AdapterError, TargetError
from sideroad.weights import has_trainable_bias, is_adaptable, layer_shape, read_dense, write_dense


class Shifted(nn.Embedding):
    """An embedding whose forward is its own, as of positions."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


def test_conv1d_reads_as_out_in() -> None:
    layer = Conv1D(3, 5)
    assert layer_shape(layer) == (3, 5)
    assert torch.equal(read_dense(layer), layer.weight.detach().t())
    x = torch.randn(2, 5)
    torch.testing.assert_close(layer(x), x @ read_dense(layer).t() + layer.bias)


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), Conv1D(3, 5)], ids=["linear", "conv1d"])
def test_write_rounds_once_and_in_place(layer: nn.Module) -> None:
    layer = layer.to(torch.bfloat16)
    stored = layer.get_parameter("weight")
    weight = torch.randn(3, 5)
    write_dense(layer, weight)
    assert layer.get_parameter("weight") is stored
    assert torch.equal(read_dense(layer, torch.bfloat16), weight.to(torch.bfloat16))


def test_read_is_a_copy() -> None:
    layer = nn.Linear(4, 4)
    read_dense(layer).zero_()
    assert layer.weight.abs().sum() > 0


def test_write_refuses_another_shape() -> None:
    with pytest.raises(AdapterError, match=r"shape \[5, 3\] into Linear; it needs \[out, in\] = \[3, 5\]"):
        write_dense(nn.Linear(5, 3), torch.zeros(5, 3))


def test_what_is_adaptable() -> None:
    attention = nn.MultiheadAttention(8, 2)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    changed = nn.Linear(4, 4)
    parametrize.register_parametrization(changed, "weight", nn.Identity())
    assert is_adaptable(nn.Linear(4, 4))
    moving = nn.Embedding(4, 4, max_norm=1.0)
    for layer in (attention, attention.out_proj, nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), nn.Conv3d(4, 4, 1)):
        assert is_adaptable(layer), layer
    for layer in (packed, changed, moving, Shifted(4, 4), nn.LayerNorm(4), nn.ConvTranspose1d(4, 4, 1), nn.ReLU()):
        assert not is_adaptable(layer), layer
    assert not is_adaptable(nn.MultiheadAttention(8, 2, kdim=4))
    with pytest.raises(TargetError, match="LayerNorm has no weight that a low-rank pair can adapt"):
        layer_shape(nn.LayerNorm(4))


def test_which_biases_can_be_trained() -> None:
    assert has_trainable_bias(nn.Linear(4, 4))
    assert has_trainable_bias(Conv1D(4, 4))
    assert has_trainable_bias(nn.LayerNorm(4))
    assert has_trainable_bias(nn.Conv1d(4, 4, 1))
    assert has_trainable_bias(nn.BatchNorm1d(4))
    assert has_trainable_bias(nn.MultiheadAttention(4, 2).out_proj)
    for layer in (nn.Linear(4, 4, bias=False), nn.Embedding(4, 4), nn.MultiheadAttention(4, 2), nn.InstanceNorm1d(4)):
        assert not has_trainable_bias(layer), layer
