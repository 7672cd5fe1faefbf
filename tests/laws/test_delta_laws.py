"""Laws that every method keeps on every kind of layer, in every dtype, with every option."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import Case, covering, full, name
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdaloraMethod, AdapterConfig, DoraMethod, LoraMethod
from sideroad.errors import AdapterError

AXES = {
    "kind": (
        "linear",
        "linear-without-bias",
        "linear-sliced",
        "conv1d",
        "embedding",
        "conv1d-layer",
        "conv2d",
        "conv2d-grouped",
        "conv2d-depthwise",
        "attention",
    ),
    "dtype": (torch.float32, torch.bfloat16),
    "scaling": ("alpha/r", "alpha/sqrt(r)"),
    "init": ("kaiming", "gaussian"),
    "method": ("lora", "lora-fa", "dora", "adalora", "pissa", "pissa-fast", "olora", "dora-pissa"),
    "bias": ("none", "adapted", "all"),
    "pattern": ("plain", "ranks"),
    "storage": ("float32", "base"),
}
WIDTH = 24


BIASLESS = ("linear-without-bias", "embedding")
"""Kinds beside whose pairs there is no bias that `adapted` could train."""


SEVERAL = ("linear-sliced", "conv2d-grouped", "conv2d-depthwise")
"""Kinds with a pair for each slice or group, which plain LoRA alone knows."""


def possible(case: Case) -> bool:
    method = case["method"]
    if method != "lora" and (case["kind"] in SEVERAL or (case["init"] != "kaiming" and "pissa" in method)):
        return False
    if case["kind"] == "embedding" and method in ("lora-fa", "dora", "dora-pissa"):
        return False
    if case["kind"] == "attention" and method.startswith("dora"):
        return False
    if method in ("olora", "adalora") and case["init"] != "kaiming":
        return False
    return not (case["kind"] in BIASLESS and case["bias"] == "adapted")


def exact(case: Case) -> bool:
    """Whether a new adapter adds exactly nothing; the others subtract what they start from, up to rounding."""
    return case["method"] in ("lora", "lora-fa", "dora", "adalora")


def near(case: Case, found: Tensor, expected: Tensor, factor: float = 1.0) -> bool:
    """Whether two outputs are equal but for rounding."""
    limit = (2e-6 if case["dtype"] == torch.float32 else 3e-2) * factor
    return bool(torch.dist(found.float(), expected.float()) <= limit * expected.float().norm())


CASES = covering(AXES, possible)
EVERY = [case for case in full(AXES) if possible(case)]


@pytest.fixture(autouse=True)
def one_path() -> Iterator[None]:
    """torch takes its fused attention where nothing requires gradients; its last bits are others."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


MAKERS: dict[str, Any] = {
    "linear": lambda out, into: nn.Linear(into, out),
    "linear-without-bias": lambda out, into: nn.Linear(into, out, bias=False),
    "linear-sliced": lambda out, into: nn.Linear(into, out),
    "conv1d": Conv1D,
    "conv1d-layer": lambda out, into: nn.Conv1d(into, out, 3, padding=1, padding_mode="circular"),
    "conv2d": lambda out, into: nn.Conv2d(into, out, (3, 1), padding="same", dilation=2),
    "conv2d-grouped": lambda out, into: nn.Conv2d(into, out, 1, groups=2),
    "conv2d-depthwise": lambda out, into: nn.Conv2d(into, out, 3, padding=1, groups=min(into, out)),
}


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        make = MAKERS[kind]
        self.norm = nn.LayerNorm(WIDTH)
        self.up = make(2 * WIDTH, WIDTH)
        self.down = make(WIDTH, 2 * WIDTH)
        self.places = {"conv1d-layer": 1, "conv2d": 2, "conv2d-grouped": 2, "conv2d-depthwise": 2}.get(kind, 0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        if not self.places:
            return x + self.down(torch.relu(self.up(hidden)))
        # channels before places, [batch, channels, 5] or [batch, channels, 5, 1]
        hidden = hidden.transpose(1, 2)
        hidden = self.down(torch.relu(self.up(hidden if self.places == 1 else hidden[..., None])))
        return x + (hidden if self.places == 1 else hidden[..., 0]).transpose(1, 2)


class AttentionBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.down = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        return x + self.up(hidden, hidden, hidden, need_weights=False)[0]


class LookupBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Embedding(7, WIDTH)
        self.down = nn.Embedding(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1]).expand(x.shape[:2])
        return self.norm(x) + self.up(ids) + self.down(ids % 3)


BLOCKS: dict[str, type[nn.Module]] = {"attention": AttentionBlock, "embedding": LookupBlock}


def model_of(case: Case) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS.get(case["kind"], Block)
    model = nn.Sequential(block(case["kind"]), block(case["kind"]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(case["dtype"]).eval()


def config_of(case: Case) -> AdapterConfig:
    kind = case["kind"]
    linear = kind.startswith("linear") or kind == "conv1d"
    targets = "all-linear" if linear else ("up", "out_proj" if kind == "attention" else "down")
    fields: dict[str, Any] = {"targets": targets, "bias": case["bias"], "dtype": case["storage"]}
    if case["pattern"] == "ranks":
        # attention and its output projection have one rank and alpha
        rank_pattern, alpha_pattern = ("*up*", "*1.up*") if kind == "attention" else ("up", "1.down")
        fields |= {"rank_pattern": {rank_pattern: 2}, "alpha_pattern": {alpha_pattern: 3.0}}
    if kind == "linear-sliced":
        fields["slices"] = {"up": (True, False, True), "down": ((16, True), (8, False))}
    rank = 1 if kind == "conv2d-depthwise" else 4
    numbers: dict[str, Any] = {"rank": rank, "alpha": 8, "scaling": case["scaling"], "init": case["init"]}
    method = {
        "lora": lambda: LoraMethod(**numbers),
        "lora-fa": lambda: LoraMethod(**numbers, trains="B"),
        "dora": lambda: DoraMethod(**numbers),
        "adalora": lambda: AdaloraMethod(**numbers, target_rank=1),
        "dora-pissa": lambda: DoraMethod(**{**numbers, "init": "pissa"}),
    }.get(case["method"], lambda: LoraMethod(**{**numbers, "init": case["method"]}))()
    return AdapterConfig(method=method, **fields)


def inputs(case: Case) -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3)).to(case["dtype"])


def fill(handle: Attached, name: str = "default", seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters(name).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def check_identity_and_return(case: Case) -> None:
    model = model_of(case)
    keys, x = bits(model), inputs(case)
    expected = model(x)
    handle = attach(model, config_of(case), seed=1)
    assert torch.equal(model(x), expected) if exact(case) else near(case, model(x), expected)
    fill(handle)
    assert not torch.equal(model(x), expected)
    with handle.disabled():
        assert torch.equal(model(x), expected)
    handle.detach()
    assert equal(bits(model), keys)
    assert torch.equal(model(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def check_merge(case: Case) -> None:
    model = model_of(case)
    before, x = bits(model), inputs(case)
    handle = attach(model, config_of(case), seed=1)
    fill(handle)
    apart = model(x)
    attached_bits = bits(model)
    with handle.merged():
        assert near(case, model(x), apart)
    assert equal(bits(model), attached_bits)
    assert torch.equal(model(x), apart)
    plain = handle.merge_and_unload()
    assert list(plain.state_dict()) == list(before)
    assert near(case, plain(x), apart)


def check_gradients(case: Case) -> None:
    model = model_of(case).train()
    handle = attach(model, config_of(case), seed=1)
    fill(handle)
    model(inputs(case)).float().square().sum().backward()
    own = {id(parameter) for parameter in handle.parameters("default").values()}
    for path, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), path
        assert parameter.requires_grad == (id(parameter) in own), path


def check_files(case: Case, folder: Path) -> None:
    model = model_of(case)
    handle = attach(model, config_of(case), seed=1)
    fill(handle)
    value = handle.adapter("default")
    value.save(folder / "adapter")
    again = model_of(case)
    loaded = attach(again, Adapter.load(folder / "adapter"))
    if case["method"] == "adalora":
        # files hold plain LoRA, with the singular values in A
        assert near(case, again(inputs(case)), model(inputs(case)))
        return
    assert torch.equal(again(inputs(case)), model(inputs(case)))
    assert loaded.adapter("default").same_weights(value)


def check_copies(case: Case) -> None:
    model = model_of(case)
    handle = attach(model, config_of(case), seed=1)
    fill(handle)
    expected = model(inputs(case))
    twin = copy.deepcopy(model)
    other = attached(twin)
    assert other is not None
    assert other.model is twin
    other.activate(())
    assert torch.equal(model(inputs(case)), expected)
    assert not torch.equal(twin(inputs(case)), expected)
    other.activate("default")
    assert torch.equal(twin(inputs(case)), expected)


def check_sums(case: Case) -> None:
    """Several adapters, each with its weight: merged they give what they give apart, in either order."""
    model = model_of(case)
    for seed, adapter in enumerate(("a", "b")):
        handle = attach(model, config_of(case), adapter, seed=seed)
        fill(handle, adapter, seed)
    if case["method"].startswith("dora"):
        with pytest.raises(AdapterError, match="are both DoRA adapters of"):
            handle.activate(["a", "b"])
        handle.detach("b")
        plain = config_of({**case, "method": "lora"})
        handle = attach(model, plain, "b", seed=1)
        fill(handle, "b", 1)
    handle.activate({"a": 0.5, "b": -2.0})
    apart = model(inputs(case))
    handle.activate({"b": -2.0, "a": 0.5})
    assert near(case, model(inputs(case)), apart, 2.5)
    with handle.merged():
        assert near(case, model(inputs(case)), apart, 2.5)


def check_rows(case: Case) -> None:
    """Each row of a mixed batch equals its adapter alone; attention's projections, which cannot, say so."""
    model = model_of(case)
    for seed, adapter in enumerate(("a", "b")):
        handle = attach(model, config_of(case), adapter, seed=seed)
        fill(handle, adapter, seed)
    x = torch.cat([inputs(case), inputs(case).flip(1)])
    rows = ["b", None, "a", "b"]
    if case["kind"] == "attention":
        with handle.rows(rows), pytest.raises(AdapterError, match=r"attention projection|cannot be split"):
            model(x)
        return
    alone = []
    for index, row in enumerate(rows):
        with handle.using(row or ()):
            alone.append(model(x)[index])
    with handle.rows(rows):
        mixed = model(x).float()
    assert near(case, mixed, torch.stack(alone))


def check_autocast(case: Case) -> None:
    """Under autocast a new adapter changes nothing, not even a type."""
    model = model_of(case)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(inputs(case))
        attach(model, config_of(case), seed=1)
        found = model(inputs(case))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected) if exact(case) else near({**case, "dtype": found.dtype}, found, expected)


LAWS = (
    check_identity_and_return, check_merge, check_gradients, check_copies, check_sums, check_rows, check_autocast,
)  # fmt: skip


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("check_"))
@pytest.mark.parametrize("case", CASES, ids=name)
def test_law(case: Case, law: Any) -> None:
    law(case)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_files_keep_every_bit(case: Case, tmp_path: Path) -> None:
    check_files(case, tmp_path)


@pytest.mark.all
@pytest.mark.parametrize("case", EVERY, ids=name)
def test_every_law_in_the_full_product(case: Case, tmp_path: Path) -> None:
    for law in LAWS:
        law(case)
    check_files(case, tmp_path)


def test_covering_set_meets_every_pair_with_few_cases() -> None:
    def pairs(cases: list[Case]) -> set[Any]:
        return {(a, str(c[a]), b, str(c[b])) for c in cases for a in AXES for b in AXES if a < b}

    assert pairs(CASES) == pairs(EVERY)
    assert len(CASES) < 80
