"""Adapters to PEFT and back, over a grid of models and options: same logits, gradients, merged weights and files."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import TIED, base_of, chosen, every, ours, run, theirs
from pairwise import Case, name
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import Attached, attach
from sideroad.errors import MergeError
from sideroad.tensor_files import read_tensors, same_bits

peft = pytest.importorskip("peft")

STRAYS = (".original_module.", ".modules_to_save.")
"""Marks of what PEFT writes beside a module trained whole with bias "all": copies that its own reader drops."""


@dataclass
class Exchange:
    """One case: PEFT's filled model over a copy of the base, and the directory that it saved."""

    case: Case
    model: Any
    directory: Path

    def base(self) -> nn.Module:
        """Return a fresh copy of the base."""
        return base_of(self.case)

    def attached(self) -> Attached:
        """Return the handle of a fresh base with PEFT's adapter."""
        return attach(self.base(), Adapter.load(self.directory))

    @property
    def close(self) -> float:
        """Relative error allowed. On a bfloat16 base PEFT's products run in float32, ours in the base's type."""
        return 8e-2 if self.case["store"] == "bfloat16" else 1e-5


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def perturb(case: Case, parameters: Mapping[str, Tensor], seed: int) -> None:
    """Change every tensor at random, so that none is what a reader would have started from."""
    # larger changes than these let the roundings of a bfloat16 base grow from layer to layer
    size, draw = (0.1 if case["store"] == "bfloat16" else 0.2), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in parameters.values():
            one += (size * torch.randn(one.shape, generator=draw)).to(one.dtype)


def exchange(case: Case, folder: Path) -> Exchange:
    """Let PEFT make, fill and save the adapter of a case."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_of(case), peft.LoraConfig(**theirs(case))).eval()
        perturb(case, trained(model), 1)
        model.save_pretrained(folder, save_embedding_layers=True if case["store"] == "embeddings" else "auto")
    return Exchange(case, model, folder)


def reload(case: Case, directory: Path) -> Any:
    """Let PEFT read a directory onto a fresh base; a tensor that it misses or does not know is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing adapter keys|unexpected).*")
        return peft.PeftModel.from_pretrained(base_of(case), directory).eval()


def same(found: Tensor, wanted: Tensor, close: float, what: str, least: float = 1e-30) -> None:
    """Compare two tensors by the norm of their difference.

    Args:
        close: limit, relative to the norm of the one wanted.
        least: the norm to take where that one's is smaller.
    """
    assert found.shape == wanted.shape, what
    error = torch.dist(found.float(), wanted.float()) / max(float(wanted.float().norm()), least)
    assert error <= close, f"{what}: relative error {error:.2e}"


def our_name(path: str) -> tuple[str, bool]:
    """Return our name of a parameter of a PEFT model, and whether it is of an attention's output projection."""
    path = path.removeprefix("base_model.model.")
    output = ".base_layer.out_proj.lora" in path
    path = path.replace(".base_layer.out_proj", ".out_proj").replace(".modules_to_save.default.", ".")
    path = re.sub(r"\.lora_(?:embedding_)?([AB])\.default(\.weight)?$", r".\1", path)
    path = path.replace(".token_adapter.trainable_tokens_delta.default", ".rows").replace(".base_layer.bias", ".bias")
    return path.replace(".original_module.", "."), output


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return what PEFT trains."""
    return {path: one for path, one in model.named_parameters() if one.requires_grad}


def check_logits(one: Exchange) -> None:
    with torch.no_grad():
        wanted, handle = run(one.case, one.model), one.attached()
        same(run(one.case, handle.model), wanted, one.close, "logits")
        plain = run(one.case, one.base())
        with handle.disabled():
            assert torch.equal(run(one.case, handle.model), plain)
    assert (wanted - plain).abs().max() > 0.01 * plain.abs().max()


def check_gradients(one: Exchange) -> None:
    """Ours are the gradients of the loss: as close to those computed exactly as PEFT's are, or closer than 1e-5.

    PEFT's own are up to 1.5e-4 off in float32 here, above all where it adds an attention's changes one after the other.
    """
    handle = one.attached()
    handle.set_trainable("default")
    draw = torch.randn(run(one.case, handle.model).shape, generator=torch.Generator().manual_seed(2))
    for model in (one.model, handle.model):
        (run(one.case, model).float() * draw).sum().backward()
    mine, theirs, exact = handle.parameters("default"), trained(one.model), exact_gradients(one, draw)
    assert {our_name(path)[0] for path in theirs} == set(mine)
    pairs = {}
    for path, parameter in theirs.items():
        found, attention_output = our_name(path)
        grad = mine[found].grad
        assert (grad is None) == (parameter.grad is None), found
        if grad is None:
            continue
        # The change counts twice in PEFT's forward, once in its gradient, so these are half of what its loss does; and
        # our B is twice its B.
        wanted = 2 * parameter.grad if attention_output and found.endswith(".A") else parameter.grad
        pairs[found] = (exact[found], grad, wanted)
    truth, ours, others = (
        torch.cat([one.flatten().float() for one in column]) for column in zip(*pairs.values(), strict=True)
    )
    off = float(torch.dist(others, truth) / truth.norm())
    if one.case["store"] == "bfloat16":
        # roundings to bfloat16 differ by more than either is off
        same(ours, truth, 0.15 + 3 * off, "gradients")
    else:
        assert off <= 3e-4
        same(ours, truth, max(one.close, 2 * off), "gradients")
        # a bias in front of a softmax has no gradient but noise
        least = 1e-2 * max(float(grad.norm()) for grad, _, _ in pairs.values())
        for found, (grad, our, their) in pairs.items():
            theirs_off = float(torch.dist(their.double(), grad)) / max(float(grad.norm()), least)
            same(our, grad, max(5 * one.close, 2 * theirs_off), found, least)
    one.model.zero_grad()


def exact_gradients(one: Exchange, draw: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the adapter computed in float64, those of a bfloat16 base's in float32."""
    narrow = one.case["store"] == "bfloat16"
    base = one.base().float() if narrow else one.base().double()
    if one.case["model"] == "moe":
        base.set_experts_implementation("eager")  # the grouped products know no float64
    handle = attach(base, Adapter.load(one.directory), trainable=True)
    (run({**one.case, "store": "float32" if narrow else "float64"}, handle.model) * draw).sum().backward()
    return {path: torch.zeros_like(p) if p.grad is None else p.grad for path, p in handle.parameters("default").items()}


def check_merged(one: Exchange) -> None:
    handle = one.attached()
    with torch.no_grad():
        unmerged = run(one.case, handle.model)
    if one.case["model"] == "conv" and one.case["targets"] == "names":
        # no weight of a grouped convolution can hold the change of PEFT's pair
        with pytest.raises(MergeError, match="reaches across the groups"):
            handle.merge_and_unload()
        with pytest.raises(NotImplementedError):
            copy.deepcopy(one.model).merge_and_unload()
        return
    plain = handle.merge_and_unload()
    with torch.no_grad():
        same(run(one.case, plain), unmerged, max(one.close, 2e-5), "logits")
    mine, wanted = plain.state_dict(), copy.deepcopy(one.model).merge_and_unload().state_dict()
    if any(".token_adapter." in path for path in wanted):
        # PEFT leaves the rows' wrapper behind below a head's pair, and its rows are lost to who loads that state dict
        assert (one.case["targets"], one.case["beside"]) == ("head", "rows")
        return
    assert mine.keys() == wanted.keys()
    for path, tensor in wanted.items():
        if not parts_from_its_tie(one.case, path):
            same(mine[path], tensor, one.close, path)


def parts_from_its_tie(case: Case, path: str) -> bool:
    """Whether PEFT merges a change of one tied weight into all who hold it (its defect D10); here they part."""
    whole = case["model"] in TIED and case["targets"] in ("embedding", "head")
    return whole and path.endswith(("lm_head.weight", "embed_tokens.weight", "shared.weight", "wte.weight"))


def check_files(one: Exchange, folder: Path) -> None:
    value = Adapter.load(one.directory)
    attach(one.base(), value).adapter("default").save(folder)
    unattached = folder.with_name("unattached")
    value.save(unattached)
    places = (folder, one.directory, unattached)
    mine, wanted, kept = (read_tensors(place / "adapter_model.safetensors") for place in places)
    own = one.base().state_dict()
    for key in wanted.keys() - mine.keys():
        path = key.removeprefix("base_model.model.").replace(".token_adapter", "").replace(".base_layer", "")
        if key.endswith("trainable_tokens_delta"):
            # of a tied head, whose rows are the embedding's
            assert sum(same_bits(wanted[key], wanted[other]) for other in mine if other.endswith("_delta")) == 1, key
        else:
            assert any(mark in key for mark in STRAYS) or same_bits(wanted[key], own[path]), key
    assert mine.keys() <= wanted.keys()
    for key, tensor in mine.items():
        assert same_bits(kept[key], wanted[key]), key
        # attaching holds the adapter in one type, where PEFT leaves biases in the base's: wider, with the same values
        assert same_bits(tensor, wanted[key].to(tensor.dtype)), key
        assert tensor.dtype.itemsize >= wanted[key].dtype.itemsize, key
    # PEFT adds and subtracts an attention's change in every forward, so its own weights have drifted by now
    close = one.close if one.case["model"] == "mha" else 1e-6
    with torch.no_grad():
        same(run(one.case, reload(one.case, folder)), run(one.case, one.model), close, "logits")


def check_own(case: Case, folder: Path) -> None:
    handle = attach(base_of(case), ours(case), seed=3)
    perturb(case, handle.parameters("default"), 4)
    handle.adapter("default").save(folder)
    with torch.no_grad():
        wanted = run(case, handle.model)
        assert torch.equal(run(case, attach(base_of(case), Adapter.load(folder)).model), wanted)
        if "grouped.A" in handle.parameters("default"):
            # ours has a pair for each group, which can be merged; PEFT has no such shapes
            with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.model\.grouped"):
                reload(case, folder)
            return
        same(run(case, reload(case, folder)), wanted, 8e-2 if case["store"] == "bfloat16" else 1e-5, "logits")


@pytest.fixture(scope="module", params=chosen(), ids=name)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    return exchange(request.param, tmp_path_factory.mktemp("peft"))


def test_what_peft_made_gives_the_same_logits(one: Exchange) -> None:
    check_logits(one)


def test_what_peft_made_gives_the_same_gradients(one: Exchange) -> None:
    check_gradients(one)


def test_what_peft_made_merges_to_the_same_weights(one: Exchange) -> None:
    check_merged(one)


def test_what_peft_made_is_written_as_peft_writes_it(one: Exchange, tmp_path: Path) -> None:
    check_files(one, tmp_path)


def test_what_we_made_is_read_by_peft(one: Exchange, tmp_path: Path) -> None:
    check_own(one.case, tmp_path)


def a_case(model: str, **changes: str) -> Case:
    """A case outside the grid: one that it leaves out, because PEFT disagrees with itself."""
    usual = {
        "targets": "names", "scale": "plain", "bias": "none", "beside": "nothing", "where": "everywhere",
        "store": "float32",
    }  # fmt: skip
    return {"model": model, **usual, **changes}


def test_an_output_projection_alone_counts_as_pefts_merged_model_has_it(tmp_path: Path) -> None:
    """PEFT's attention passes by the pair on its projection in the forward, so that it never learns; its merge counts.

    Here the pair acts, unmerged and merged.
    """
    one = exchange(a_case("mha", targets="all-linear"), tmp_path)
    handle = one.attached()
    assert "layers.0.mha.out_proj" in handle.paths("default")
    with torch.no_grad():
        unmerged, found = run(one.case, one.model), run(one.case, handle.model)
        merged = run(one.case, one.model.merge_and_unload())
    same(found, merged, 1e-5, "logits")
    assert (merged - unmerged).abs().max() > 0.05 * merged.abs().max()


@pytest.mark.all
@pytest.mark.parametrize("case", every(), ids=name)
def test_every_exchange_of_the_full_product(case: Case, tmp_path: Path) -> None:
    one = exchange(case, tmp_path / "peft")
    check_logits(one)
    check_gradients(one)
    check_merged(one)
    check_files(one, tmp_path / "ours")
    check_own(case, tmp_path / "own")
