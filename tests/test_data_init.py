"""Starts that look at data: EVA's directions are the best there are, LoRA-GA's first step is the theorem's."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, DoraMethod, EvaInit, LoraGaInit, LoraMethod
from sideroad.errors import ConfigError, TargetError

IDS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(24)[None] < 6, -100)
BATCHES = [{"input_ids": IDS[:1], "labels": LABELS[:1]}, {"input_ids": IDS[1:], "labels": LABELS[1:]}]


def inputs_of(model: nn.Module, path: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    handle.remove()
    return torch.cat([x[batch["labels"] != -100] for x, batch in zip(seen, BATCHES, strict=True)])


def test_eva_explains_most_of_what_enters_a_layer() -> None:
    model = tiny_llama()
    x = inputs_of(model, "model.layers.1.mlp.down_proj")
    before = model(IDS).logits
    config = AdapterConfig(targets="down_proj", method=LoraMethod(rank=4, init=EvaInit(rho=1)))
    handle = attach(model, config, seed=0, batches=BATCHES)
    assert torch.equal(model(IDS).logits, before)
    A = handle.parameters("default")["model.layers.1.mlp.down_proj.A"].detach()
    torch.testing.assert_close(A @ A.t(), torch.eye(4), rtol=0, atol=1e-5)
    best = torch.linalg.svdvals(x)[:4].square().sum()
    assert float((x @ A.t()).square().sum()) == pytest.approx(float(best), rel=1e-5)


def test_eva_deals_the_same_number_of_ranks_and_keeps_every_scale() -> None:
    model = tiny_llama()
    config = AdapterConfig(method=LoraMethod(rank=4, alpha=8, scaling="alpha/sqrt(r)", init=EvaInit(rho=3)))
    handle = attach(model, config, seed=0, batches=BATCHES)
    value = handle.adapter("default")
    assert sum(value.ranks.values()) == 4 * 14
    assert max(value.ranks.values()) <= 12
    assert len(set(value.ranks.values())) > 1
    assert all(value.scale(path) == pytest.approx(8 / 4**0.5) for path in value.paths)


def test_eva_shares_what_one_tensor_gives() -> None:
    handle = attach(tiny_llama(), AdapterConfig(method=LoraMethod(rank=2, init=EvaInit(rho=1))), batches=BATCHES)
    pairs = handle.parameters("default")
    names = [f"model.layers.0.self_attn.{name}_proj.A" for name in "qkv"]
    assert torch.equal(pairs[names[0]], pairs[names[1]])
    assert torch.equal(pairs[names[0]], pairs[names[2]])


def gradient_of(model: nn.Module, path: str) -> Tensor:
    weight = model.get_submodule(path).weight
    found = [torch.autograd.grad(model(**batch).loss, weight)[0] for batch in BATCHES]
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
def test_the_first_step_of_lora_ga_is_the_best_of_its_rank(path: str) -> None:
    """Theorem 3.1: with k = 1, B Bᵀ G + G Aᵀ A is the best approximation of G of rank 2 r."""
    model, rank = tiny_llama(), 3
    G = gradient_of(model, path)
    before = model(IDS).logits
    config = AdapterConfig(targets=path, method=LoraMethod(rank=rank, init=LoraGaInit(gamma=16)))
    handle = attach(model, config, seed=0, batches=BATCHES)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-5)
    delta = handle.deltas("default")[path]
    k = G.shape[0] ** 0.25 / 16**0.5
    A, B = delta.A.detach() / k, delta.B.detach() / k
    U, S, Vh = torch.linalg.svd(G)
    best = (U[:, : 2 * rank] * S[: 2 * rank]) @ Vh[: 2 * rank]
    torch.testing.assert_close(B @ (B.t() @ G) + (G @ A.t()) @ A, best, rtol=1e-4, atol=1e-6 * float(S[0]))


def test_nothing_of_the_model_is_left_changed() -> None:
    model = tiny_llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: one.requires_grad for name, one in model.named_parameters()}
    bits = {name: one.clone() for name, one in model.state_dict().items()}
    attach(model, AdapterConfig(method=LoraMethod(rank=2, init="lora-ga")), batches=BATCHES).detach()
    assert model.training
    assert {name: one.requires_grad for name, one in model.named_parameters()} == flags
    assert all(torch.equal(one, bits[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters())


def test_what_is_missing_is_said() -> None:
    config = AdapterConfig(method=LoraMethod(rank=2, init="eva"))
    with pytest.raises(ConfigError, match=r"init: eva looks at training data, and there is none; pass attach"):
        attach(tiny_llama(), config)
    with pytest.raises(ConfigError, match=r"init: kaiming looks at no data; leave batches out"):
        attach(tiny_llama(), AdapterConfig(), batches=BATCHES)
    with pytest.raises(ConfigError, match=r"init: lora-ga needs a loss; give labels"):
        attach(
            tiny_llama(), AdapterConfig(method=LoraMethod(rank=2, init="lora-ga")), batches=[{"input_ids": IDS}]
        )
    with pytest.raises(TargetError, match=r"lora-ga takes 2 x rank directions, so its rank can be 8 at most, found 9"):
        attach(tiny_llama(), AdapterConfig(method=LoraMethod(rank=9, init="lora-ga")), batches=BATCHES)
    layers = AdapterConfig(targets=("q_proj", "embed_tokens"), method=LoraMethod(rank=2, init="eva"))
    with pytest.raises(TargetError, match=r"embed_tokens is a Embedding; init: eva looks at linear layers only"):
        attach(tiny_llama(), layers, batches=BATCHES)


def test_what_cannot_be_looked_at_is_said() -> None:
    nothing = [{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}]
    for init in ("eva", "lora-ga"):
        with pytest.raises(ConfigError, match="looks at trained tokens, and no batch has any"):
            attach(tiny_llama(), AdapterConfig(method=LoraMethod(rank=2, init=init)), batches=nothing)
    tied = AdapterConfig(targets=("q_proj", "lm_head"), method=LoraMethod(rank=2, init="lora-ga"))
    with pytest.raises(TargetError, match=r"lm_head shares its weight with model.embed_tokens, so its own gradient"):
        attach(tiny_llama(tie_word_embeddings=True), tied, batches=BATCHES)
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    for method in (LoraMethod(rank=2, init="pissa"), DoraMethod(rank=2)):
        with pytest.raises(TargetError, match=r"0.self_attn.q_proj has weights that are NaN or infinite"):
            attach(broken, AdapterConfig(method=method))


def test_batches_may_be_endless_and_more_than_the_first_is_looked_at() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, second: bool) -> Tensor:
            return self.a(x) + (self.b(2 * x) if second else 0)

    rows = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    batches = ({"x": rows, "second": number > 0} for number in count())
    config = AdapterConfig(method=LoraMethod(rank=2, init=EvaInit(batches=3, rho=1)))
    handle = attach(Sometimes(), config, seed=0, batches=batches)
    assert set(handle.paths("default")) == {"a", "b"}
    pair = handle.parameters("default")
    torch.testing.assert_close(pair["a.A"].abs(), pair["b.A"].abs(), rtol=1e-4, atol=1e-5)


def test_layers_are_told_apart_by_all_their_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.a(x) + self.b(other) + self.b(x)

    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(40, 6, generator=generator), 3 * torch.randn(40, 6, generator=generator)
    config = AdapterConfig(method=LoraMethod(rank=2, init=EvaInit(rho=1)))
    handle = attach(Twice(), config, seed=0, batches=[{"x": x, "other": other}])
    A = handle.parameters("default")["b.A"].detach()
    both = torch.cat([x, other])
    best = torch.linalg.svdvals(both)[:2].square().sum()
    assert float((both @ A.t()).square().sum()) == pytest.approx(float(best), rel=1e-5)
