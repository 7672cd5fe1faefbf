"""The fast path equals the plain one: loss and every gradient, whatever is combined with it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from pairwise import Case, covering, full, name
from tiny import recompute_activations
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from zoo import VOCABULARY, ZOO

from sideroad.attaching import Attached, attach
from sideroad.config import AdaloraMethod, AdapterConfig, DoraMethod, LoraMethod
from sideroad.data.encode import Encoded
from sideroad.kernels.compiled import compiled, refusal
from sideroad.kernels.isolation import PackingRoute, choose_route
from sideroad.kernels.pieces import Pieces
from sideroad.train.choosing import choose_execution
from sideroad.train.execution import Execution
from sideroad.train.settings import TrainConfig

AXES = {
    "model": (
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_oss", "mixtral",
        "qwen2_moe",
    ),
    "scaling": ("alpha/r", "alpha/sqrt(r)"),
    "dropout": (0.0, 0.25),
    "bias": ("none", "adapted"),
    "targets": ("all-linear", "with head", "upper"),
    "layout": ("shared", "packed", "padded"),
    "checkpointing": (False, True),
    "batches": (1, 3),
    "pieces": ("eager", "compiled"),
}
BIASLESS = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "mixtral")
MIXTURES = ("gpt_oss", "mixtral", "qwen2_moe")


def possible(case: Case) -> bool:
    if case["bias"] == "adapted" and case["model"] in BIASLESS:
        return False  # no layer has a bias
    if case["dropout"] and (case["layout"] == "shared" or case["batches"] > 1):
        return False  # sequences that share a beginning would share its mask; other micro-batches draw others
    if case["model"] in ("opt", "gpt_oss") and case["targets"] == "with head":
        return False  # tied, or refused by the survey
    return not (case["model"] == "gpt_oss" and case["layout"] != "padded")  # it cannot be packed


CASES = covering(AXES, possible)
EVERY = [case for case in full(AXES) if possible(case)]


@cache
def examples() -> tuple[Encoded, ...]:
    """Nine sequences on two levels of common beginnings, one of which is a whole sequence; 14 to 33 tokens."""
    generator = random.Random(4)

    def draw(count: int) -> list[int]:
        return [generator.randrange(1, VOCABULARY) for _ in range(count)]

    system = draw(10)
    tasks = [system + draw(9), system + draw(8)]
    rows = [task + draw(count) for task in tasks for count in (5, 12, 3)] + [system + draw(4), tasks[0], draw(14)]
    marks = [[False] * 6 + [generator.random() < 0.6 for _ in row[6:]] for row in rows]
    return tuple(Encoded(row, mark, str(number)) for number, (row, mark) in enumerate(zip(rows, marks, strict=True)))


@cache
def compiled_pieces(model: str) -> Pieces:
    """The pieces of a run; each model has its own, as each run has."""
    return compiled()


def build(case: Case) -> tuple[nn.Module, Attached]:
    changes: dict[str, Any] = {"sliding_window": 64} if case["model"] in ("mistral", "gemma2", "gemma3") else {}
    model = ZOO[case["model"]](**changes)
    targets: Any = {
        "all-linear": "all-linear",
        "with head": ("re:.*([.]|_)(proj|fc|attn|qkv_proj|gate_up_proj)", "lm_head"),
        "upper": ("re:.*[.]1[.].*(proj|fc1|fc2|c_fc|c_attn|out_proj).*",),
    }[case["targets"]]
    if case["targets"] == "with head":
        targets = ("re:.*(proj|fc|attn)", "lm_head")
    method = LoraMethod(rank=4, alpha=8, dropout=case["dropout"], scaling=case["scaling"])
    # experts have no branch to drop from
    exclude = ("*.experts.*",) if case["model"] in MIXTURES and case["dropout"] else ()
    handle = attach(model, AdapterConfig(targets=targets, exclude=exclude, method=method, bias=case["bias"]), seed=0)
    generator = torch.Generator().manual_seed(2)
    for path, parameter in handle.parameters("default").items():
        if not path.endswith(".A"):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    if case["checkpointing"]:
        recompute_activations(model)
    return model.train(), handle


def execution(case: Case, model: nn.Module) -> Execution:
    route = PackingRoute("none", "as the case says") if case["layout"] == "padded" else choose_route(model)
    config = TrainConfig(compile="off")
    made = choose_execution(model, route, config, pad_id=0, share=case["layout"] == "shared")
    if case["pieces"] == "compiled":
        made = Execution(**{**vars(made), "pieces": compiled_pieces(case["model"])})
    return made


def gradients(made: Execution, handle: Attached, batches: int) -> tuple[float, list[Tensor]]:
    """Loss and gradients of micro-batches one after another."""
    parameters = list(handle.parameters("default").values())
    rows, total = list(examples()), 0.0
    for parameter in parameters:
        parameter.grad = None
    with made.running():
        for start in range(batches):
            torch.manual_seed(5)
            loss = made.loss_of(made.lay_out(rows[start::batches]))
            loss.backward()
            total += loss.item()
    return total, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def reference(model: nn.Module, handle: Attached) -> tuple[float, list[Tensor]]:
    """Each sequence alone through the unchanged model, the loss taken in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for one in examples():
        logits = model(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0, :-1].double()
        wanted = torch.tensor([token if on else -100 for token, on in zip(one.ids[1:], one.trained[1:], strict=True)])
        total = total + cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
    parameters = list(handle.parameters("default").values())
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return total.item(), [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative distance of a gradient, small ones by the largest of all.

    That of a key's bias is zero but for rounding, since it moves all scores of a query alike: what is left of it is the
    rounding of the terms that cancel, which are of the size of other gradients.
    """
    largest = max(float(one.norm()) for one in expected)

    def size(one: Tensor) -> float:
        cancelled = float(one.norm()) < 1e-6 * largest
        return max(float(one.norm()), (5e-2 if cancelled else 5e-3) * largest)

    return max(float((a - b).norm()) / size(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "case",
    [*(pytest.param(case, id=name(case)) for case in CASES)]
    + [pytest.param(case, id=name(case), marks=pytest.mark.all) for case in EVERY if case not in CASES],
)
def test_fast_equals_plain(case: Case) -> None:
    if case["pieces"] == "compiled" and refusal(torch.device("cpu")):
        pytest.skip("no compiler")
    model, handle = build(case)
    fast = execution(case, model)
    assert fast.fast is not None
    value, found = gradients(fast, handle, case["batches"])
    if case["dropout"]:
        plain = choose_execution(model, fast.route, TrainConfig(fast=False), pad_id=0)
        expected_value, expected = gradients(plain, handle, case["batches"])
    else:
        expected_value, expected = reference(model, handle)
    assert value == pytest.approx(expected_value, rel=2e-5)
    assert worst(found, expected) <= 2e-5
    if case["layout"] == "shared" and fast.shares and case["batches"] == 1:
        batch = fast.lay_out(examples())
        assert batch.computed_tokens < batch.real_tokens


METHODS = {
    "lora-fa": LoraMethod(rank=4, alpha=8, trains="B"),
    "dora": DoraMethod(rank=4, alpha=8),
    "adalora": AdaloraMethod(rank=4, alpha=8, target_rank=2),
    "pissa": LoraMethod(rank=4, alpha=8, init="pissa"),
    "dora-pissa": DoraMethod(rank=4, alpha=8, init="pissa"),
}


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_on_the_fast_path(method: str, kind: str, layout: str) -> None:
    case = {"model": kind, "layout": layout, "pieces": "eager"}
    model = ZOO[kind]()
    handle = attach(model, AdapterConfig(method=METHODS[method]), seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in handle.parameters("default").values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.train()
    # GPT-2 drops by itself, which no two layouts do alike
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fast = execution(case, model)
    assert fast.fast is not None
    value, found = gradients(fast, handle, 1)
    expected_value, expected = reference(model, handle)
    assert value == pytest.approx(expected_value, rel=2e-5)
    assert worst(found, expected) <= 2e-5
