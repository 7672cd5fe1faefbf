"""pairs: slices of fused layers against loralib's definition, groups, and files that PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fill
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import AdapterError, ConfigError, TargetError
from sideroad.pairs import blocks, compact, enabled, matrices, out_of, spread

IDS = torch.arange(12)[None]
QV = {"c_attn": (True, False, True)}
UNEVEN = {"0": ((8, True), (2, False), (4, True))}


def gpt2(**changes: Any) -> Any:
    torch.manual_seed(0)
    fields = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16, **changes}
    return GPT2LMHeadModel(GPT2Config(**fields, bos_token_id=0, eos_token_id=0)).eval()


def adapted(model: nn.Module, slices: Any, targets: str = "c_attn", **method: Any) -> Attached:
    config = AdapterConfig(targets=targets, slices=slices, method=LoraMethod(rank=2, alpha=6, **method))
    handle = attach(model, config, seed=0)
    fill(handle, size=0.3)
    return handle


def test_q_and_v_of_a_fused_projection_each_own_a_pair_as_in_loralib() -> None:
    model = gpt2()
    expected = {}
    handle = adapted(model, QV)
    for path in handle.paths("default"):
        A, B = (handle.parameters("default")[f"{path}.{part}"] for part in "AB")
        assert (tuple(A.shape), tuple(B.shape)) == ((4, 16), (32, 2))
        change = torch.zeros(48, 16)
        change[:16] = 3.0 * B[:16] @ A[:2]
        change[32:] = 3.0 * B[16:] @ A[2:]
        expected[path] = model.get_submodule(path).weight.detach() + change.t()
    apart = model(IDS).logits
    with handle.merged():
        for path, weight in expected.items():
            torch.testing.assert_close(model.get_submodule(path).weight, weight)
        torch.testing.assert_close(model(IDS).logits, apart, rtol=1e-5, atol=1e-5)


def test_count_of_the_paper_for_gpt2_medium() -> None:
    with torch.device("meta"):
        model = gpt2(n_embd=1024, n_layer=24, n_head=16, vocab_size=50257, n_positions=1024)
    config = AdapterConfig(targets="c_attn", slices=QV, method=LoraMethod(rank=4))
    assert sum(one.numel() for one in attach(model, config).parameters("default").values()) == 393_216


def test_key_rows_stay_and_their_part_of_the_product_costs_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 14))
    x = torch.randn(3, 6)
    base = model(x)
    handle = adapted(model, UNEVEN, "0")
    A, B = handle.parameters("default").values()
    assert (tuple(A.shape), tuple(B.shape)) == ((4, 6), (12, 2))
    out = model(x)
    assert torch.equal(out[:, 8:10], base[:, 8:10])
    torch.testing.assert_close(out[:, :8], base[:, :8] + 3.0 * x @ A[:2].t() @ B[:8].t())
    torch.testing.assert_close(out[:, 10:], base[:, 10:] + 3.0 * x @ A[2:].t() @ B[8:].t())
    value = handle.adapter("default")
    low = value.lower("0")
    torch.testing.assert_close(out - base, x @ (low.B @ low.A).t(), rtol=1e-4, atol=1e-5)
    assert (value.ranks, value.scale("0"), value.parameters) == ({"0": 2}, 3.0, 48)


@pytest.mark.filterwarnings("ignore")  # of PEFT, about transformers and Conv1D
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_files_are_ordinary_for_peft_and_compact_again_for_us(tmp_path: Path, scaling: Any) -> None:
    peft = pytest.importorskip("peft")
    model = gpt2()
    handle = adapted(model, QV, scaling=scaling)
    logits, value = model(IDS).logits, handle.adapter("default")
    value.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    again = Adapter.load(tmp_path / "adapter")
    assert again.same_weights(value)
    assert again.config.slices == QV
    mine = gpt2()
    attach(mine, again)
    assert torch.equal(mine(IDS).logits, logits)
    # without our own file it is PEFT's ordinary pair, with the same product
    (tmp_path / "adapter" / "sideroad.json").unlink()
    plain = Adapter.load(tmp_path / "adapter")
    assert plain.config.slices == {}
    assert set(plain.ranks.values()) == {4}
    other = gpt2()
    attach(other, plain)
    torch.testing.assert_close(other(IDS).logits, logits, rtol=1e-5, atol=1e-5)


def test_ranks_of_the_file_win_over_an_older_pattern_for_the_same_path(tmp_path: Path) -> None:
    model = nn.ModuleDict({"up": nn.Linear(6, 12)})
    config = AdapterConfig(targets="up", slices={"up": (True, False, True)}, rank_pattern={"re:up": 2})
    handle = attach(model, config)
    fill(handle)
    x = torch.randn(2, 6)
    handle.adapter("default").save(tmp_path / "a")
    (tmp_path / "a" / "sideroad.json").unlink()
    twin = nn.ModuleDict({"up": nn.Linear(6, 12)})
    twin["up"].load_state_dict({"weight": model["up"].weight, "bias": model["up"].bias})
    attach(twin, Adapter.load(tmp_path / "a"))
    torch.testing.assert_close(twin["up"](x), model["up"](x))


def test_loading_another_adapter_takes_over_its_slices() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 12)), torch.randn(2, 6)
    twin = nn.Sequential(nn.Linear(6, 12))
    twin.load_state_dict(model.state_dict())
    value = adapted(model, {"0": (True, False, True)}, "0").adapter("default")
    handle = adapted(twin, {"0": (True, True, False)}, "0")
    handle.load("default", value)
    assert torch.equal(twin(x), model(x))
    assert handle.adapter("default").config.slices == value.config.slices


@pytest.mark.parametrize(
    ("slices", "out", "where"),
    [
        ((True, False, True), 12, ((0, 4), (8, 12))),
        ((False, True), 6, ((3, 6),)),
        (((8, True), (2, False), (4, True)), 14, ((0, 8), (10, 14))),
    ],
)
def test_blocks_and_back(slices: Any, out: int, where: Any) -> None:
    assert blocks(slices, out) == where
    rows = sum(stop - start for start, stop in where)
    assert out_of(slices, rows) == out
    assert enabled(slices) == len(where)
    B = torch.randn(rows, 2)
    wide = spread(B, where, out)
    assert wide.shape == (out, 2 * len(where))
    at = 0
    for index, (start, stop) in enumerate(where):
        assert torch.equal(wide[start:stop, 2 * index : 2 * index + 2], B[at : at + stop - start])
        at += stop - start
    assert wide.count_nonzero() == B.numel()
    small = compact(wide, where)
    assert small is not None
    assert torch.equal(small, B)
    wide[where[-1][0], 0] += 0 if len(where) == 1 else 1
    if len(where) > 1:
        assert compact(wide, where) is None


def test_groups_are_seen_by_the_shapes() -> None:
    A, B = torch.randn(4, 3, 5), torch.randn(6, 2, 1)
    low, high = matrices(A, B)
    expected = torch.cat([B.flatten(1)[:3] @ A.flatten(1)[:2], B.flatten(1)[3:] @ A.flatten(1)[2:]])
    torch.testing.assert_close(high @ low, expected)
    plain: list[Tensor] = [torch.randn(2, 5), torch.randn(6, 2)]
    assert all(one is two or torch.equal(one, two) for one, two in zip(matrices(*plain), plain, strict=True))


def test_slices_that_do_not_fit_are_refused_in_words() -> None:
    with pytest.raises(AdapterError, match=r"slices \[True, False\] do not make up an output of 7; give as many"):
        blocks((True, False), 7)
    model = nn.Sequential(nn.Linear(6, 14), nn.Embedding(9, 6))
    with pytest.raises(TargetError, match=r"0: slices \[\(8, True\), \(2, False\)\] do not make up an output of 14"):
        attach(model, AdapterConfig(targets="0", slices={"0": ((8, True), (2, False))}))
    with pytest.raises(TargetError, match='slices "c_attn" matches none of the adapted layers'):
        attach(model, AdapterConfig(targets="0", slices=QV))
    with pytest.raises(TargetError, match="slices are given for 1, which is no linear layer"):
        attach(model, AdapterConfig(targets="1", slices={"1": (True, False)}))
    with pytest.raises(TargetError, match=r"rank 8 is larger than 0 .* the largest rank there is 4"):
        attach(model, AdapterConfig(targets="0", slices=UNEVEN))
    for wrong, words in (((False, False), "no part has a pair"), ((True, (2, True)), "give true/false for equal")):
        with pytest.raises((ConfigError, ValueError), match=words):
            AdapterConfig(targets="0", slices={"0": wrong})
    value = adapted(nn.Sequential(nn.Linear(6, 14)), UNEVEN, "0").adapter("default")
    with pytest.raises(AdapterError, match="0: has slices that do not fit"):
        attach(nn.Sequential(nn.Linear(6, 15)), value)
