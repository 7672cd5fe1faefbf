"""20 steps of each method beside PEFT's, from the same tensors: losses agree to rounding where PEFT is right.

Where it is not, a test says which side we take: the weights in AdaLoRA's sensitivity and its orthogonality term
(methods/budget.py), and the start of LoRA-GA (data_init.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer

from sideroad.attaching import attach
from sideroad.config import AdaloraMethod, AdapterConfig, DoraMethod, LoraMethod, PairSettings
from sideroad.handle import Attached
from sideroad.methods.budget import budget_for
from sideroad.train import optimizer as ours
from sideroad.train.settings import OptimConfig

peft = pytest.importorskip("peft")
from peft.optimizers import create_loraplus_optimizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS, LR = 20, 5e-3
TARGETS = ("q_proj", "v_proj", "up_proj")
ROWS = torch.randint(3, 250, (2, 3, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": rows, "labels": rows} for rows in ROWS]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def curve(model: nn.Module, optimizer: Optimizer, around: tuple[Callable[[], None], Callable[[int], None]]) -> Tensor:
    """Losses of the steps; `around` is called after the gradients, and after the optimizer with the step's number."""
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, ROWS[step % len(ROWS)])
        loss.backward()
        around[0]()
        optimizer.step()
        around[1](step + 1)
        losses.append(loss.detach())
    return torch.stack(losses)


def nothing(*_: Any) -> None:
    pass


def our_side(method: PairSettings, data: bool = False) -> tuple[nn.Module, Attached]:
    model = tiny_llama()
    config = AdapterConfig(targets=TARGETS, method=method)
    return model, attach(model, config, seed=0, batches=BATCHES if data else None)


def their_side(handle: Attached, config: Any) -> Any:
    """PEFT's model with our tensors in it; a start that is subtracted is subtracted from its base, as PEFT does it."""
    model = peft.get_peft_model(tiny_llama(), config)
    names = {"A": "lora_A", "B": "lora_B", "E": "lora_E", "magnitude": "lora_magnitude_vector"}
    with torch.no_grad():
        for path, delta in handle.deltas("default").items():
            layer = model.get_submodule(f"base_model.model.{path}")
            if delta.A0 is not None:
                base = tiny_llama().get_submodule(path).weight
                layer.base_layer.weight.copy_(base - delta.scale * delta.B0 @ delta.A0)
            for part in ("A", "B", "E", "magnitude"):
                if hasattr(delta, part):
                    found = getattr(layer, names[part])["default"]
                    (found if isinstance(found, nn.Parameter) else found.weight).copy_(getattr(delta, part))
    return model.train()


CASES: dict[str, tuple[PairSettings, dict[str, Any], bool]] = {
    "lora": (LoraMethod(rank=4), {}, False),
    "rslora": (LoraMethod(rank=4, scaling="alpha/sqrt(r)"), {"use_rslora": True}, False),
    "dora": (DoraMethod(rank=4), {"use_dora": True}, False),
    "pissa": (LoraMethod(rank=4, init="pissa"), {}, False),
    "olora": (LoraMethod(rank=4, init="olora"), {}, False),
    "eva": (LoraMethod(rank=4, init={"kind": "eva", "rho": 1}), {}, True),
    "lora-ga": (LoraMethod(rank=4, init="lora-ga"), {}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_of_20_steps_agree(name: str) -> None:
    method, fields, data = CASES[name]
    model, handle = our_side(method, data)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(TARGETS), **fields)
    theirs = their_side(handle, config)
    expected = curve(theirs, AdamW([p for p in theirs.parameters() if p.requires_grad], LR), (nothing, nothing))
    found = curve(model.train(), AdamW(handle.parameters("default").values(), LR), (nothing, nothing))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    assert float(found[-1]) < float(found[0])


def test_lora_plus_agrees() -> None:
    model, handle = our_side(LoraMethod(rank=4))
    theirs = their_side(handle, peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(TARGETS)))
    fast = create_loraplus_optimizer(theirs, optimizer_cls=AdamW, lr=1e-3, loraplus_lr_ratio=16, eps=1e-8)
    expected = curve(theirs, fast, (nothing, nothing))
    built = ours.build(handle.parameters("default"), OptimConfig(lr=1e-3, lr_ratio_b=16))
    torch.testing.assert_close(curve(model.train(), built, (nothing, nothing)), expected, rtol=2e-5, atol=0)


def test_adalora_agrees_where_peft_is_asked_before_the_optimizer() -> None:
    """PEFT is meant to be asked after it, when the weights are no longer those that the gradient is of."""
    method = AdaloraMethod(rank=4, target_rank=2, warmup=0.1, final=0.2, every=2, orthogonality=0)
    model, handle = our_side(method)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=2, lora_alpha=16, total_step=STEPS,
        target_modules=list(TARGETS), beta1=0.85, beta2=0.85,
    )  # fmt: skip
    theirs = their_side(handle, config)
    allocator = theirs.base_model.rankallocator

    def masked(step: int) -> None:
        size, due = allocator.budget_schedule(step)
        if due or step >= STEPS - 4:
            allocator.mask_to_budget(theirs.base_model.model, size)

    around = (lambda: allocator.update_ipt(theirs.base_model.model), masked)
    # the loss is taken from logits, so PEFT adds no orthogonality term
    expected = curve(theirs, AdamW([p for p in theirs.parameters() if p.requires_grad], LR), around)
    budget = budget_for(handle.deltas("default"), method, STEPS)
    assert budget is not None
    found = curve(model.train(), AdamW(handle.parameters("default").values(), LR), (budget.observe, budget.prune))
    torch.testing.assert_close(found[:17], expected[:17], rtol=2e-5, atol=0)
    alive = sum(int((delta.E != 0).sum()) for delta in handle.deltas("default").values())
    assert alive == 2 * len(handle.deltas("default"))


def test_the_authors_lora_ga_is_taken_where_pefts_carries_the_gradients_units() -> None:
    """Scaling the loss must not change where training starts: the authors' start is of the gradient's directions."""
    _, one = our_side(LoraMethod(rank=4, init="lora-ga"), data=True)
    model = tiny_llama()
    config = AdapterConfig(targets=TARGETS, method=LoraMethod(rank=4, init="lora-ga"))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **batch: Tensor) -> Any:
            out = self.model(**batch)
            out.loss = 1000 * out.loss
            return out

    other = attach(Scaled(), config, seed=0, batches=BATCHES)
    for path, delta in one.deltas("default").items():
        twin = other.deltas("default")[f"model.{path}"]
        torch.testing.assert_close(twin.B @ twin.A, delta.B @ delta.A, rtol=1e-3, atol=1e-5)
