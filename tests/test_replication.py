"""Blocks that stand in a model several times: by one module, by modules of one weight, and by PEFT's replication."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IDS, fill, tiny_llama
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, MergeError, TargetError
from sideroad.peft import PeftModel
from sideroad.targets import resolve

peft = pytest.importorskip("peft")

CONFIG = AdapterConfig(method=LoraMethod(rank=4))
ORDER = (0, 1, 0, 1)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def one_module() -> Any:
    """A Llama whose two blocks run twice: four places in the list, two modules."""
    model = tiny_llama()
    blocks = list(model.model.layers)
    model.model.layers = nn.ModuleList([blocks[index] for index in ORDER])
    model.config.num_hidden_layers = len(ORDER)
    return model


def one_weight() -> Any:
    """The same computation by four modules, of which the later two hold the weights of the first two."""
    model = tiny_llama()
    blocks = list(model.model.layers)
    weights = {id(one): one for one in model.parameters()}
    model.model.layers = nn.ModuleList([*blocks, *(copy.deepcopy(block, dict(weights)) for block in blocks)])
    model.config.num_hidden_layers = len(ORDER)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def test_a_block_that_stands_twice_is_one_block() -> None:
    model = one_module()
    base, before = logits(model), copy.deepcopy(model.state_dict())
    assert torch.equal(base, logits(one_weight()))
    handle = attach(model, CONFIG)
    assert len(handle.paths("default")) == 14
    assert all(".layers.0." in path or ".layers.1." in path for path in handle.paths("default"))
    fill(handle)
    apart = logits(model)
    handle.merge()
    torch.testing.assert_close(logits(model), apart, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    assert all(torch.equal(one, before[path]) for path, one in model.state_dict().items() if ".lora." not in path)
    assert torch.equal(logits(model), apart)
    handle.detach()
    assert torch.equal(logits(model), base)


def test_its_adapter_is_saved_once_and_read_by_peft(tmp_path: Path) -> None:
    model = one_module()
    handle = attach(model, CONFIG)
    fill(handle)
    handle.adapter("default").save(tmp_path)
    assert torch.equal(logits(attach(one_module(), Adapter.load(tmp_path)).model), logits(model))
    theirs = peft.PeftModel.from_pretrained(one_module(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_its_gradients_are_the_sum_over_its_places() -> None:
    model, apart = one_module(), one_weight()
    handle, other = attach(model, CONFIG, seed=0), attach(apart, CONFIG, seed=0)
    fill(handle)
    mine, theirs = handle.parameters("default"), other.parameters("default")

    def source(path: str) -> str:
        return path.replace(".layers.2.", ".layers.0.").replace(".layers.3.", ".layers.1.")

    with torch.no_grad():
        for path, one in theirs.items():
            one.copy_(mine[source(path)])
    for each in (model, apart):
        each(IDS, labels=IDS, use_cache=False).loss.backward()
    for path, one in mine.items():
        wanted = sum(other.grad for place, other in theirs.items() if source(place) == path)
        torch.testing.assert_close(one.grad, wanted, rtol=1e-4, atol=1e-6)


def test_a_place_that_is_another_is_no_block_of_its_own() -> None:
    with pytest.raises(TargetError, match="asks for 2, but LlamaForCausalLM has blocks 0-1 only"):
        resolve(one_module(), CONFIG.model_copy(update={"layers": (2,)}))
    assert len(resolve(one_weight(), CONFIG.model_copy(update={"layers": (2,)}))) == 7


def test_blocks_of_one_weight_have_pairs_of_their_own_and_do_not_merge(tmp_path: Path) -> None:
    model = one_weight()
    before = {path: one.clone() for path, one in model.state_dict().items()}
    handle = attach(model, CONFIG)
    assert len(handle.paths("default")) == 28
    fill(handle)
    apart = logits(model)
    for merge in (handle.merge, handle.merge_and_unload):
        with pytest.raises(MergeError, match=r"are one tensor in memory \(replicated or shared layers\)"):
            merge()
    assert torch.equal(logits(model), apart)
    assert all(torch.equal(model.state_dict()[path], one) for path, one in before.items())
    handle.adapter("default").save(tmp_path)
    assert torch.equal(logits(attach(one_weight(), Adapter.load(tmp_path)).model), apart)
    # parted, each block has a weight to merge into
    split = one_weight()
    for block in split.model.layers[2:]:
        for layer in block.modules():
            for name, one in list(layer._parameters.items()):
                layer._parameters[name] = None if one is None else nn.Parameter(one.detach().clone())
    own = attach(split, Adapter.load(tmp_path))
    own.merge()
    torch.testing.assert_close(logits(split), apart, rtol=1e-5, atol=1e-5)


def test_an_adapter_for_pefts_replication_is_refused_by_name(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_llama(), config)
    assert len(theirs.base_model.model.model.layers) == 4
    theirs.save_pretrained(tmp_path)
    words = r"layer_replication is set \(\[\[0, 2\], \[0, 2\]\]\): layers stacked several times\. That changes what"
    with pytest.raises(AdapterError, match=words):
        Adapter.load(tmp_path)
    with pytest.raises(AdapterError, match=words):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_its_pairs_fit_the_model_that_has_the_blocks(tmp_path: Path) -> None:
    """The blocks stacked by hand and the field left out, it computes what PEFT's replication does."""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], layer_replication=[[0, 2], [0, 2]])
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    torch.manual_seed(1)
    for path, one in theirs.named_parameters():
        if "lora_" in path:
            nn.init.normal_(one.data, std=0.1)
    theirs.peft_config["default"].layer_replication = None
    theirs.save_pretrained(tmp_path)
    mine = attach(one_weight(), Adapter.load(tmp_path))
    torch.testing.assert_close(logits(mine.model), logits(theirs), rtol=1e-5, atol=1e-5)
