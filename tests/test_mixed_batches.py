"""rows() on models: every row equals its adapter alone, in value and gradient, and nothing stays behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from mixed import IDS, ROWS, alone, four, logits
from tiny import fill, recompute_activations, tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sideroad.attaching import attach, attached
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, MergeError
from sideroad.route import Names


def near(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert (found - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [ROWS, sorted(ROWS, key=str), [None] * 6, ["all"] * 6], ids=range(4))
def test_each_row_equals_its_adapter_alone(rows: list[Names | None], dtype: torch.dtype) -> None:
    handle = four(tiny_llama().to(dtype))
    with handle.rows(rows):
        found = logits(handle)
    for row, names in enumerate(rows):
        expected = alone(handle, names, lambda: logits(handle))[row]
        near(found[row].double(), expected.double(), 1e-5 if dtype == torch.float32 else 2e-2)
        if names is None:
            assert torch.equal(found[row], expected)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(input=self.one(input=x).tanh())


@pytest.mark.parametrize("shape", [(6,), (2, 6), (3, 2, 6), (0, 6)])
def test_biases_any_shape_and_keywords(shape: tuple[int, ...]) -> None:
    model = Biased()
    for name, bias in (("pair", "adapted"), ("bare", "all"), ("none", "none")):
        fill(attach(model, AdapterConfig(targets="one", bias=bias, method=LoraMethod(rank=3)), name), name)
    handle = attached(model)
    assert handle is not None
    x = torch.randn(5, *shape)
    rows = ["pair", "bare", None, "pair", "none"]
    with handle.rows(rows):
        found = model(x)
    for row, names in enumerate(rows):
        near(found[row], alone(handle, names, lambda: model(x))[row])


@pytest.mark.parametrize("recomputed", [False, True], ids=["saved", "recomputed"])
def test_gradients_equal_those_of_the_rows_alone(recomputed: bool) -> None:
    handle = four()
    handle.set_trainable(handle.names)
    handle.model.train()
    if recomputed:
        recompute_activations(handle.model)

    def gradients(ids: Tensor) -> dict[str, Tensor]:
        handle.model(ids).logits.square().sum().backward()
        named = {f"{name}/{path}": one for name in handle.names for path, one in handle.parameters(name).items()}
        found = {path: one.grad for path, one in named.items() if one.grad is not None}
        handle.model.zero_grad()
        return found

    with handle.rows(ROWS):
        found = gradients(IDS)
    expected: dict[str, Tensor] = {}
    for row, names in enumerate(ROWS[2:], start=2):
        with handle.using(names or ()):
            for path, one in gradients(IDS[row, None]).items():
                expected[path] = expected[path] + one if path in expected else one
    with handle.using("all"):
        for path, one in gradients(IDS[0, None]).items():
            expected[path] = expected[path] + one
    assert found.keys() == expected.keys()
    for path, one in expected.items():
        near(found[path], one)


@pytest.mark.parametrize("rows", [["a"] * 3, ["a", "b", "a"]])
def test_an_operation_in_place_may_follow(rows: list[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.ReLU(inplace=True))
    attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=2)), "a")
    handle = attach(model, AdapterConfig(targets="1", method=LoraMethod(rank=2)), "b")
    with handle.rows(rows):
        model(torch.randn(3, 6)).sum().backward()
    assert all(one.grad is not None for one in handle.parameters("a").values())


def test_dropout_is_each_adapters_own() -> None:
    width = 64
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    nn.init.zeros_(model[0].weight)
    for name, rate in (("half", 0.5), ("whole", 0.0), ("tenth", 0.1)):
        method = LoraMethod(rank=width, alpha=width, dropout=rate)
        handle = attach(model, AdapterConfig(targets="0", method=method), name)
        for parameter in handle.parameters(name).values():
            nn.init.eye_(parameter.data)
    model.train()
    torch.manual_seed(0)
    rates = {"half": 0.5, "whole": 0.0, "tenth": 0.1, None: 1.0}
    rows: list[Any] = ["half", "whole", None, "tenth", "half"]
    with handle.rows(rows):
        y = model(torch.ones(5, 200, width))
    for name, row in zip(rows, y, strict=True):
        assert float((row == 0).float().mean()) == pytest.approx(rates[name], abs=0.02)
        kept = row[row != 0]
        assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - rates[name]) if name else 0))
    assert not torch.equal(y[0], y[4])


class Counter(TorchDispatchMode):
    """Counts operations that make new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(one.alias_info for one in func._schema.returns)
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> int:
    with torch.no_grad(), Counter() as counter:
        run()
    return counter.count


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_operations_do_not_grow_beyond_the_segments_own(count: int) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    for index in range(8):
        handle = attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=4)), str(index))
    x = torch.randn(8, 5, 16)

    def run() -> Tensor:
        return model(x)

    base = operations(lambda: alone(handle, None, run))
    own = operations(lambda: alone(handle, "0", run)) - base
    grouped = sorted(str(index % count) for index in range(8))
    with FlopCounterMode(display=False) as flops, handle.rows(grouped):
        assert operations(run) == base + count * own + (count > 1)  # one join
    with FlopCounterMode(display=False) as plain, handle.using("0"):
        run()
    assert flops.get_total_flops() == plain.get_total_flops()
    shuffled = [str(index % count) for index in range(8)]
    with handle.rows(shuffled):
        # x and y sorted, then joined; eight different rows need no sorting
        assert operations(run) == base + count * own + {1: 0, 2: 3, 4: 3, 8: 1}[count]
    with handle.rows([None] * 8):
        assert operations(run) == base
    with handle.rows([None, "0", None, None, None, None, None, None]):
        assert operations(run) == base + own + 1


def test_an_exception_in_the_forward_leaves_nothing_behind() -> None:
    handle = four()
    handle.activate({"a": 0.5})
    fresh = copy.deepcopy(handle.model)(IDS).logits
    hook = handle.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with suppress(ZeroDivisionError), handle.rows(ROWS):
        logits(handle)
    hook.remove()
    words = r"rows\(\) named 3 rows, but an input of Linear.* is \[6, 7, 32\]"
    with pytest.raises(AdapterError, match=words), handle.rows(["a", "a", "a"]):
        logits(handle)
    assert handle.by_row == ()
    assert handle.active == {"a": 0.5}
    assert torch.equal(logits(handle), fresh)
    handle.merge()


def test_the_latest_choice_counts_and_blocks_restore() -> None:
    handle = four()
    plain = {names: alone(handle, names, lambda: logits(handle)) for names in ("a", "b.2", None)}
    with handle.using("b.2"):
        with handle.rows(ROWS):
            mixed = logits(handle)
            assert handle.active == {}
            assert handle.by_row == (
                {"all": 1},
                {},
                {"a": 0.5, "b.2": -2},
                {"apart": 1},
                {"apart": 1, "a": 1},
                {"all": 1},
            )
            for block, expected in ((handle.using("a"), plain["a"]), (handle.disabled(), plain[None])):
                with block:
                    assert handle.by_row == ()
                    assert torch.equal(logits(handle), expected)
                assert torch.equal(logits(handle), mixed)
            with handle.rows(["b.2"] * 6):
                assert torch.equal(logits(handle), plain["b.2"])
            assert torch.equal(logits(handle), mixed)
            handle.activate("a")
            assert handle.active == {"a": 1.0}
            assert handle.by_row == ()
            assert torch.equal(logits(handle), plain["a"])
        assert handle.active == {"b.2": 1.0}
        assert torch.equal(logits(handle), plain["b.2"])
    assert handle.active == {"a": 1.0}


def test_contradictions_are_refused() -> None:
    handle = four()
    with handle.disabled():
        with pytest.raises(AdapterError, match=r"rows\(\) inside a disabled\(\) block: the one names adapters"):
            handle.rows(["a"]).__enter__()
        with handle.using("a"), handle.rows(ROWS):
            pass
        assert torch.equal(logits(handle), tiny_llama()(IDS).logits)
    with handle.rows(ROWS):
        for names in (None, "a"):
            with pytest.raises(AdapterError, match=r"a merge holds for all rows, but rows\(\) says what acts"):
                handle.merged(names).__enter__()
    handle.merge()
    with pytest.raises(MergeError, match=r"rows\(\) while a is merged into the weights; unmerge\(\) first"):
        handle.rows(["a"]).__enter__()


def test_what_is_wrong_with_the_list_is_said_at_once() -> None:
    handle = four()
    with pytest.raises(AdapterError) as caught:
        handle.rows(["a", "zz", None, {"a": float("nan")}, "zz"]).__enter__()
    assert str(caught.value).splitlines() == [
        "rows(): 2 problems.",
        '  - row 1, 4: no adapter is named "zz". Attached: a, b.2, all, apart.',
        '  - row 3: the weight of adapter "a" is nan; it must be a finite number.',
    ]
    for names in ("apart", {"a": 1.0}):
        with pytest.raises(
            AdapterError, match=r"rows\(\) takes a list with one entry for each row of the batch, found"
        ):
            handle.rows(names).__enter__()  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"rows\(\) got an empty list"):
        handle.rows([]).__enter__()
    assert torch.equal(logits(handle), alone(handle, "a", lambda: logits(handle)))


def test_a_second_thread_sees_the_rows_but_cannot_switch() -> None:
    handle = four()
    with ThreadPoolExecutor(1) as pool:
        with handle.rows(ROWS):
            inside = logits(handle)
            assert torch.equal(pool.submit(logits, handle).result(), inside)
            for act in (lambda: handle.rows(ROWS).__enter__(), lambda: handle.activate("a"),
                        lambda: handle.using("a").__enter__(), lambda: handle.disabled().__enter__()):  # fmt: skip
                with pytest.raises(
                    AdapterError, match=r"another thread is inside a using\(\), rows\(\) or disabled\(\)"
                ):
                    pool.submit(act).result()
        with handle.using("all"), pytest.raises(AdapterError, match="another thread is inside"):
            pool.submit(lambda: handle.rows(ROWS).__enter__()).result()
    assert handle.active == {"a": 1.0}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_what_acts_until_it_is_switched(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    handle = four()
    with handle.rows(ROWS):
        inside = logits(handle)
        other = attached(duplicate(handle.model))
    assert other is not None
    assert torch.equal(logits(other), inside)
    with pytest.raises(AdapterError, match="leave its block first"):
        other.merge()
    other.detach("all")
    assert other.by_row[0] == other.by_row[5] == {}
    assert torch.equal(logits(other)[2], inside[2])
    other.activate("b.2")
    other.merge()
    assert handle.active == {"a": 1.0}
    with handle.disabled():
        asleep = attached(duplicate(handle.model))
    assert asleep is not None
    with asleep.rows(ROWS):
        assert torch.equal(logits(asleep), inside)


def test_a_compiled_model_follows_the_rows() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    for name in ("a", "bb"):
        handle = attach(model, AdapterConfig(targets="0", method=LoraMethod(rank=3)), name)
        fill(handle, name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(4, 6)
    for rows in (["a", "bb", None, "a"], ["bb", "bb", "a", "a"]):
        with handle.rows(rows):
            near(compiled(x), model(x))
    near(compiled(x), model(x))
