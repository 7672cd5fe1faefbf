"""What a training step keeps for its backward pass, counted by the tensors that autograd saves, not by a clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import VOCABULARY, llama

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.data.encode import Encoded
from sideroad.kernels.isolation import choose_route
from sideroad.train.choosing import choose_execution
from sideroad.train.settings import TrainConfig

RANK = 2


def kept_elements(model: nn.Module, compute: Callable[[], Tensor]) -> int:
    """Elements of the distinct storages that a forward pass saves, the model's own tensors left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            seen[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), note(t))[1], lambda t: t):
        loss = compute()
    assert loss.requires_grad
    return sum(seen.values())


def of_one_block(fast: bool, dropout: float = 0.0) -> float:
    """Elements that one block more keeps, per token."""
    found = []
    for blocks in (3, 4):
        model = llama(num_hidden_layers=blocks)
        method = LoraMethod(rank=RANK, alpha=4, dropout=dropout)
        attach(model, AdapterConfig(method=method), seed=0)
        made = choose_execution(
            model.train(), choose_route(model), TrainConfig(fast=fast, compile="off"), pad_id=0, share=False
        )
        rows = [Encoded([1 + (7 * at + length) % (VOCABULARY - 1) for at in range(length)], [True] * length, "")
                for length in (13, 8, 19)]
        with made.running():
            found.append(kept_elements(model, lambda made=made, rows=rows: made.loss_of(made.lay_out(rows))))
    return (found[1] - found[0]) / 40


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_block_keeps_what_the_formula_says(dropout: float) -> None:
    width, inner, keys, heads = 32, 48, 16, 4
    norms = 2 * (width + 1)  # each norm's input and 1/rms; what it gives is made again
    attention = width + 2 * keys + width + heads  # q, k, v, output and log-sum-exp
    gated = 2 * inner  # e and g; h is made again
    pairs = 7 * RANK
    assert of_one_block(fast=True, dropout=dropout) == norms + attention + gated + pairs


def test_the_plain_path_keeps_more() -> None:
    assert of_one_block(fast=False) > 1.4 * of_one_block(fast=True)
