"""Modules that look like what the fast path knows, and compute something else: each keeps its own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional
from zoo import COMMON, _make, bloom, llama, mamba, opt

from sideroad.attaching import Attached, attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.data.encode import Encoded
from sideroad.kernels.isolation import choose_route
from sideroad.kernels.structure import match_gated, match_norm
from sideroad.train.choosing import choose_execution
from sideroad.train.execution import Execution
from sideroad.train.settings import TrainConfig

ROWS = [Encoded([1 + (7 * at + 3 * length) % 96 for at in range(length)], [True] * length, "") for length in (9, 5, 13)]


def adapt(model: Any, dropout: float = 0.0, targets: Any = "all-linear", spread: float = 0.2) -> Attached:
    config = AdapterConfig(targets=targets, method=LoraMethod(rank=2, alpha=4, dropout=dropout))
    handle = attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for path, parameter in handle.parameters("default").items():
        if path.endswith(".B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return handle


def both(model: Any, handle: Attached) -> tuple[Execution, float]:
    """The fast path's decisions, and how far its gradient is from the plain one's under the same seed."""
    model.train()
    parameters, route = list(handle.parameters("default").values()), choose_route(model)
    found = []
    for fast in (True, False):
        made = choose_execution(model, route, TrainConfig(fast=fast, compile="off"), pad_id=0, share=False)
        with made.running():
            torch.manual_seed(3)
            loss = made.loss_of(made.lay_out(ROWS))
            found.append((made, torch.autograd.grad(loss, parameters, allow_unused=True)))
    pairs = [(a, b) for a, b in zip(found[0][1], found[1][1], strict=True) if a is not None and b is not None]
    off = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    return found[0][0], off**0.5


MODELS: dict[str, Callable[[], Any]] = {
    "residual dropout": lambda: _make(
        tf.SeedOssConfig(**{**COMMON, "head_dim": 8, "residual_dropout": 0.3, "attention_dropout": 0.0})
    ),
    "residual dropout of an MLP": lambda: _make(
        tf.Starcoder2Config(
            **{**COMMON, "residual_dropout": 0.3, "embedding_dropout": 0.0, "attention_dropout": 0.0}
        )
    ),
    "attention dropout": lambda: llama(attention_dropout=0.2),
    "clamped projections": lambda: _make(tf.OlmoConfig(**{**COMMON, "clip_qkv": 1.5})),
    "half of each head rotated": lambda: _make(
        tf.Glm4MoeConfig(
            **{**COMMON, "head_dim": 8, "partial_rotary_factor": 0.5, "first_k_dense_replace": 2},
            n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        )
    ),
    "norm over all heads": lambda: _make(tf.Olmo2Config(**COMMON)),
    "interleaved rotation": lambda: _make(tf.CohereConfig(**COMMON)),
    "multipliers": lambda: _make(
        tf.GraniteConfig(**COMMON, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=8.0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MODELS))
def test_models_of_other_kinds_train_the_same(name: str) -> None:
    model = MODELS[name]()
    _, off = both(model, adapt(model))
    assert off < 2e-5


def test_projections_that_are_clamped_far_from_the_probe_are_noticed() -> None:
    model = _make(tf.OlmoConfig(**{**COMMON, "clip_qkv": 8.0}))
    made, off = both(model, adapt(model, spread=1.5))
    assert made.fast is not None
    assert not made.fast.attentions
    assert off < 2e-5


def test_dropout_draws_are_those_of_the_plain_path_whatever_the_layout_in_memory() -> None:
    model = mamba()
    _, off = both(model, adapt(model, dropout=0.3, targets=("re:.*(in_proj|out_proj)",)))
    assert off < 2e-5


class Clamped(nn.Module):
    def __init__(self, order: str = "gate first", dropout: float = 0.0, limit: float = 7.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.order, self.limit, self.drop = order, limit, nn.Dropout(dropout)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "gate first":
            e, g = self.gate_proj(x), self.up_proj(x)
        else:
            g, e = self.up_proj(x), self.gate_proj(x)
        return self.down_proj(self.drop(functional.silu(e.clamp(max=self.limit)) * g))


def test_gated_blocks_are_known_by_their_results_at_every_size_and_in_training() -> None:
    free = float("inf")
    assert match_gated(Clamped(limit=free)) is not None
    assert match_gated(Clamped(limit=7.0)) is None
    assert match_gated(Clamped(limit=free, dropout=0.5)) is None
    found = match_gated(Clamped("up first", limit=free))
    assert found is not None
    assert (found.gate, found.gate_first) == ("gate_proj", False)


class Capped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-500, 500)
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def test_a_norm_that_clamps_is_none() -> None:
    assert match_norm(Capped()) is None


def test_autocast_leaves_the_layers_to_themselves() -> None:
    model = llama()
    handle = adapt(model)
    made = choose_execution(model.train(), choose_route(model), TrainConfig(compile="off"), pad_id=0)
    with made.running(), torch.autocast("cpu", torch.bfloat16):
        loss = made.loss_of(made.lay_out(ROWS))
        loss.backward()
    assert all(one.grad is not None for one in handle.parameters("default").values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: bloom(hidden_dropout=0.3),
        lambda: opt(layerdrop=0.5),
        lambda: _make(
            tf.Starcoder2Config(
                **{**COMMON, "embedding_dropout": 0.3, "residual_dropout": 0.0, "attention_dropout": 0.0}
            )
        ),
    ],
)
def test_what_is_drawn_at_random_is_neither_kept_nor_shared(make: Callable[[], Any]) -> None:
    model = make()
    adapt(model, targets=("re:.*[.]1[.].*(proj|fc1|fc2|c_fc|query_key_value|dense.*)",))
    made = choose_execution(
        model.train(), choose_route(model), TrainConfig(compile="off"), pad_id=0, repeats=True
    )
    assert made.frozen is None
    assert not made.shares
