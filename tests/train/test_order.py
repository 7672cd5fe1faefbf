"""The order of training: every example once an epoch, another order in each, and no state but a cursor."""

from __future__ import annotations

from sideroad.train.order import Cursor, Order
from sideroad.train.seeds import derive
from sideroad.train.settings import OptimConfig, TrainConfig

LENGTHS = [5 + 7 * index % 23 for index in range(23)]


def order(packed: bool = True, seed: int = 0, **optim: int | None) -> Order:
    config = OptimConfig.model_validate({"batch_size": 4, "accumulate": 4, **optim})
    return Order(LENGTHS, config, seed=seed, packed=packed)


def test_each_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    epochs = [[index for batch in order().epoch(number) for index in batch] for number in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(seed=1).epoch(0) != order().epoch(0)
    assert order().epoch(0) == order().epoch(0)


def test_no_step_reaches_into_the_next_epoch() -> None:
    steps = list(order().steps(TrainConfig(epochs=2)))
    assert [len(step) for step in steps] == [4, 2, 4, 2]
    assert order().step(Cursor(0, 4)) == (order().epoch(0)[4:], Cursor(1, 0))


def test_max_steps_cuts() -> None:
    assert len(list(order().steps(TrainConfig(epochs=2, max_steps=3)))) == 3
    assert len(list(order().steps(TrainConfig(epochs=2, max_steps=30)))) == 4


def test_batches_by_tokens_hold_what_fits() -> None:
    for packed in (False, True):
        plan = order(packed, batch_size=None, batch_tokens=60).epoch(0)
        for batch in plan:
            lengths = [LENGTHS[index] for index in batch]
            assert (sum(lengths) if packed else len(lengths) * max(lengths)) <= 60


def test_derived_seeds_are_fixed_and_independent() -> None:
    assert derive(0, "init") == 1519069808562059438
    places = [derive(seed, *place) for seed in (0, 1) for place in (("init",), ("data",), (1, 2), (2, 1), (12,))]
    assert len(set(places)) == len(places)
    assert all(0 <= value < 2**63 for value in places)
