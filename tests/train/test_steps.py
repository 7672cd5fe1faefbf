"""One optimizer step: the gradient is that of the mean over its trained tokens, however it is cut up."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sideroad.attaching import attach
from sideroad.config import AdapterConfig
from sideroad.data.batches import Batch, collate
from sideroad.data.encode import Encoded
from sideroad.errors import TrainingError
from sideroad.kernels.isolation import choose_route, packing
from sideroad.train.choosing import choose_execution
from sideroad.train.progress import Progress
from sideroad.train.settings import OptimConfig, TrainConfig
from sideroad.train.steps import Stepper
from sideroad.train.watchdog import Watchdog


def examples(count: int = 12) -> list[Encoded]:
    """Sequences of 4 to 37 tokens, of which between 1 and all but two are trained."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(count):
        length = 4 + 3 * index
        ids = torch.randint(3, 259, (length,), generator=generator).tolist()
        begin = 2 + int(torch.randint(length - 3, (1,), generator=generator))
        found.append(Encoded(ids, [position >= begin for position in range(length)], f"made up:{index}"))
    return found


def adapted() -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A tiny Llama whose adapter is not at its start, where B = 0 hides A's gradient."""
    model = tiny_llama()
    handle = attach(model, AdapterConfig(), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in handle.parameters("default").values():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, handle.parameters("default")


def stepper(model: nn.Module, parameters: dict[str, nn.Parameter], **optim: float) -> Stepper:
    watchdog = Watchdog(259, "float32", parameters)
    execution = choose_execution(model, choose_route(model), TrainConfig(), pad_id=0)
    return Stepper(
        model, parameters, OptimConfig(**optim), watchdog, loss_of=execution.loss_of, steps=10, seed=0
    )


def reference() -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in fp64, one example at a time without padding, by torch's own cross-entropy."""
    model, parameters = adapted()
    model.double()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for example in examples():
        ids = torch.tensor([example.ids])
        wanted = torch.where(torch.tensor(example.trained), ids[0], -100)[1:]
        total = total + cross_entropy(model(input_ids=ids).logits[0, :-1], wanted, reduction="sum")
        count += sum(example.trained)
    (total / count).backward()
    return float(total.detach()) / count, {name: parameter.grad for name, parameter in parameters.items()}  # type: ignore[misc]


def cut(sizes: Sequence[int], *, packed: bool) -> list[Batch]:
    remaining = examples()
    batches = []
    for size in sizes:
        batches.append(collate(remaining[:size], packed=packed, pad_id=0))
        remaining = remaining[size:]
    assert not remaining
    return batches


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (1, 11), (5, 5, 2), (1,) * 12], ids=str)
def test_any_cut_gives_the_gradient_of_the_mean(packed: bool, sizes: tuple[int, ...]) -> None:
    loss, gradients = reference()
    model, parameters = adapted()
    batches = cut(sizes, packed=packed)
    with packing(model, choose_route(model)):
        prepared = stepper(model, parameters).prepare(Progress(), batches, [["x"]] * len(batches))
    assert prepared.loss == pytest.approx(loss, rel=2e-5)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        error = (parameter.grad.double() - gradients[name]).norm() / gradients[name].norm()
        assert error <= 2e-5, name


def test_a_step_follows_the_clipped_gradient_and_the_schedule() -> None:
    model, parameters = adapted()
    by_hand = copy.deepcopy(parameters)
    taken = stepper(model, parameters, lr=0.01, clip_norm=0.1, warmup_steps=4)
    prepared = taken.prepare(Progress(), cut((12,), packed=False), [["x"]])
    assert prepared.grad_norm > 0.1
    for name, parameter in by_hand.items():
        gradient = parameters[name].grad
        assert gradient is not None
        parameter.grad = gradient * (0.1 / prepared.grad_norm)
    taken.apply(prepared)
    torch.optim.AdamW(by_hand.values(), lr=0.01 / 4, weight_decay=0.0).step()
    assert prepared.lr == 0.01 / 4
    assert all(torch.allclose(parameters[name], by_hand[name], rtol=1e-6, atol=1e-8) for name in parameters)


def test_preparing_a_step_changes_no_weight_and_twice_is_the_same() -> None:
    model = tiny_llama()
    handle = attach(model, AdapterConfig.model_validate({"method": {"kind": "lora", "dropout": 0.5}}), seed=0)
    parameters = handle.parameters("default")
    before = copy.deepcopy(parameters)
    taken = stepper(model, parameters)
    first = taken.prepare(Progress(step=3), cut((6, 6), packed=False), [["x"]] * 2)
    torch.rand(100)
    second = taken.prepare(Progress(step=3), cut((6, 6), packed=False), [["x"]] * 2)
    other = taken.prepare(Progress(step=4), cut((6, 6), packed=False), [["x"]] * 2)
    assert first == second
    assert other.grad_norm != first.grad_norm
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)


def test_a_step_with_nothing_to_learn_is_refused() -> None:
    model, parameters = adapted()
    empty = Encoded([5, 6, 7], [False] * 3, "made up:9")
    batch = collate([empty], packed=False, pad_id=0)
    with pytest.raises(TrainingError, match="step 1 has no trained token in any of its examples: made up:9"):
        stepper(model, parameters).prepare(Progress(), [batch], [["made up:9"]])


def test_a_scale_that_overflows_is_halved_until_it_fits() -> None:
    model, parameters = adapted()
    plain = stepper(model, parameters).prepare(Progress(), cut((12,), packed=False), [["x"]])
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    scaled = stepper(model, parameters).prepare(Progress(loss_scale=2.0**127), cut((12,), packed=False), [["x"]])
    assert 1 < scaled.progress.loss_scale < 2.0**127
    assert scaled.loss == plain.loss
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-5, atol=1e-9)
