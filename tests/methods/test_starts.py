"""Starts from the weight: the base stays what it is, and the exported adapter says the same on a pristine base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import IDS, tiny_llama

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.init import start_from_weight

INITS = ("pissa", "pissa-fast", "olora")


@pytest.mark.parametrize("init", ["pissa", "pissa-fast"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_pissa_holds_the_leading_triplets(init: str, scale: float) -> None:
    torch.manual_seed(0)
    W = torch.randn(40, 24) @ torch.diag(0.8 ** torch.arange(24.0))
    A, B = start_from_weight(W, init, 5, scale, 0)
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(scale * B @ A, (U[:, :5] * S[:5]) @ Vh[:5], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((A @ A.t()).diagonal(), S[:5] / scale, rtol=1e-4, atol=1e-5)


def test_olora_is_a_part_of_the_qr_decomposition() -> None:
    torch.manual_seed(0)
    W = torch.randn(12, 9)
    A, B = start_from_weight(W, "olora", 9, 1.0, 0)
    torch.testing.assert_close(B @ A, W, rtol=1e-5, atol=1e-5)
    A, B = start_from_weight(W, "olora", 4, 1.0, 0)
    torch.testing.assert_close(B.t() @ B, torch.eye(4), rtol=0, atol=1e-5)
    assert not A.tril(-1).any()


def test_a_layer_narrower_than_the_rank_is_filled_up() -> None:
    for init in INITS:
        A, B = start_from_weight(torch.randn(3, 8), init, 5, 1.0, 0)
        assert (A.shape, B.shape) == ((5, 8), (3, 5))


@pytest.mark.parametrize("init", INITS)
def test_base_stays_and_the_export_is_an_ordinary_adapter(init: str, tmp_path: Path) -> None:
    model = tiny_llama()
    bits = {name: one.clone() for name, one in model.state_dict().items()}
    before = model(IDS).logits
    handle = attach(model, AdapterConfig(method=LoraMethod(rank=4, init=init)), seed=0)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for one in handle.parameters("default").values():
            one.add_(0.02 * torch.randn_like(one))
    after = model(IDS).logits
    value = handle.adapter("default")
    value.save(tmp_path / "a")
    assert all(torch.equal(model.state_dict()[name], one) for name, one in bits.items())
    (tmp_path / "a/sideroad.json").unlink()
    plain = Adapter.load(tmp_path / "a")
    assert set(plain.ranks.values()) == {8}
    assert plain.config.method.init == "kaiming"
    pristine = tiny_llama()
    attach(pristine, plain)
    torch.testing.assert_close(pristine(IDS).logits, after, rtol=1e-5, atol=1e-5)
    assert all(value.scale(path) == plain.scale(path) for path in value.paths)


def test_lora_fa_keeps_a_and_moves_the_weight_by_the_projected_gradient() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 6, bias=False))
    handle = attach(model, AdapterConfig(method=LoraMethod(rank=3, alpha=6, trains="B")), seed=0)
    delta = handle.deltas("default")["0"]
    assert list(handle.parameters("default")) == ["0.B"]
    A, x, g = delta.A.clone(), torch.randn(8, 10), torch.randn(8, 6)
    (model(x) * g).sum().backward()
    G = g.t() @ x
    step = delta.scale * delta.B.grad @ A
    projected = G @ A.t() @ torch.linalg.inv(A @ A.t()) @ A
    torch.testing.assert_close(step, projected, rtol=1e-4, atol=1e-5)
    (model(x) * g).sum().backward()
    torch.testing.assert_close(delta.B.grad, 2 * (step @ torch.linalg.pinv(delta.scale * A)), rtol=1e-3, atol=1e-4)
    assert torch.equal(delta.A, A)
    value = handle.adapter("default")
    assert set(value.weights["0"]) == {"A", "B"}


def test_lora_fa_keeps_no_input_for_the_backward_pass() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 48))
    sizes: dict[str, set[int]] = {}
    for trains in ("both", "B"):
        handle = attach(model, AdapterConfig(method=LoraMethod(rank=2, trains=trains)), seed=0)
        sizes[trains] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes[trains].add(one.numel()), lambda one: one):  # noqa: B023
            model(torch.randn(37, 64))
        handle.detach()
    assert 37 * 64 in sizes["both"]
    assert 37 * 64 not in sizes["B"]


def test_dependent_rows_of_a_do_no_harm_to_lora_fa() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    handle = attach(model, AdapterConfig(method=LoraMethod(rank=9, alpha=9, trains="B")), seed=0, any_rank=True)
    delta = handle.deltas("default")["0"]
    x, g = torch.randn(8, 6), torch.randn(8, 5)
    (model(x) * g).sum().backward()
    # nine rows span all six inputs, so nothing of the gradient is lost
    torch.testing.assert_close(delta.scale * delta.B.grad @ delta.A, g.t() @ x, rtol=1e-3, atol=1e-3)
