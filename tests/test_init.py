"""init: the same seed gives the same adapter, whatever else there is."""

from __future__ import annotations

import math

import torch
from tiny import tiny_llama

from sideroad.attaching import attach
from sideroad.config import AdapterConfig
from sideroad.init import start_pair, starts_as_base
from sideroad.targets import Target


def target(path: str = "q", rank: int = 16, into: int = 1000) -> Target:
    return Target(path, 64, into, rank, 16.0, ((rank, into), (64, rank)), 64)


def test_distributions() -> None:
    A = start_pair(target(), "kaiming", 0)["A"]
    bound = 1 / math.sqrt(1000)
    assert 0.99 * bound < float(A.abs().max()) <= bound
    assert abs(float(A.std()) - bound / math.sqrt(3)) < 0.02 * bound
    assert abs(float(start_pair(target(), "gaussian", 0)["A"].std()) - 1 / 16) < 0.001
    assert not start_pair(target(), "gaussian", 0)["B"].any()


def test_an_adapter_starts_as_the_base_where_its_product_is_zero() -> None:
    for init in ("kaiming", "gaussian", "random"):
        pair = start_pair(target(), init, 0)
        assert starts_as_base(init) == (not (pair["B"] @ pair["A"]).any()), init


def test_an_embedding_starts_with_a_zero_and_b_normal() -> None:
    pair = start_pair(target(rank=64, into=2000), "kaiming", 0, looked_up=True)
    assert not pair["A"].any()
    assert abs(float(pair["B"].std()) - 1) < 0.05
    assert start_pair(target(), "random", 0, looked_up=True)["A"].any()


def test_seed_and_path_decide() -> None:
    def draw(path: str, seed: int) -> torch.Tensor:
        return start_pair(target(path), "kaiming", seed)["A"]

    assert torch.equal(draw("q", 1), draw("q", 1))
    assert not torch.equal(draw("q", 1), draw("q", 2))
    assert not torch.equal(draw("q", 1), draw("k", 1))


def test_other_adapters_and_other_targets_do_not_matter() -> None:
    alone, beside = tiny_llama(), tiny_llama()
    one = attach(alone, AdapterConfig(targets=("q_proj",)), seed=4).parameters("default")
    attach(beside, AdapterConfig(), "first", seed=9)
    two = attach(beside, AdapterConfig(targets=("k_proj", "q_proj")), "second", seed=4).parameters("second")
    assert one
    assert all(torch.equal(parameter, two[name]) for name, parameter in one.items())


def test_without_a_seed_torchs_generator_decides() -> None:
    def draw() -> torch.Tensor:
        return next(iter(attach(tiny_llama(), AdapterConfig()).parameters("default").values())).detach()

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    attach(tiny_llama(), AdapterConfig(), seed=1)
    assert torch.equal(torch.get_rng_state(), state), "a given seed leaves the global generator alone"
