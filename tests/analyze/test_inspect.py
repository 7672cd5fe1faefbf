"""Reports on adapter directories."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from mixtures import mixture
from tiny import fill, tiny_llama

from sideroad.adapter import Adapter, BaseRecord
from sideroad.analyze.inspect import RankReport, inspect_adapter, ranks_of
from sideroad.analyze.spectrum import effective_rank, stable_rank
from sideroad.attaching import attach
from sideroad.config import AdapterConfig, DoraMethod, LoraMethod
from sideroad.errors import AdapterError

WEIGHTS = {
    "m.0.q": {"A": torch.eye(2, 5), "B": 3 * torch.eye(4, 2)},
    "m.1.q": {"A": torch.eye(4, 5), "B": torch.zeros(4, 4)},
    "m.0.v": {"A": torch.eye(2, 5).bfloat16(), "B": torch.tensor([[2.0, 0], [0, 0]]).bfloat16()},
    "m.norm": {"bias": torch.tensor([3.0, 4.0])},
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = AdapterConfig(targets=("q", "v"), bias="all", rank_pattern={"m.1.q": 4}, alpha_pattern={"v": 6},
                           method=LoraMethod(rank=2, alpha=4))  # fmt: skip
    Adapter(config, WEIGHTS, BaseRecord("tiny"), manifest={"score": 1}).save(tmp_path / "a", card="x")
    return tmp_path / "a"


def test_counts_files_and_groups(directory: Path) -> None:
    report = inspect_adapter(directory)
    assert [file.name for file in report.files] == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "sideroad.json",
    ]  # fmt: skip
    assert report.files[0].bytes == 1
    assert report.parameters == 18 + 36 + 14 + 2
    assert report.tensor_bytes == 4 * (18 + 36 + 2) + 2 * 14
    assert report.dtypes == {"float32": 5, "bfloat16": 2}
    assert report.biases == {"m.norm": 5.0}
    q = next(group for group in report.groups if group.leaf == "q")
    assert (q.modules, q.parameters, q.rank_min, q.rank_max) == (2, 54, 2, 4)
    assert (q.norm, q.norm_max) == (pytest.approx(3 * math.sqrt(2)), pytest.approx(6 * math.sqrt(2)))


def test_norms_and_spectra_are_those_of_the_scaled_product(directory: Path) -> None:
    modules = {module.path: module for module in inspect_adapter(directory).modules}
    full, zero, single = modules["m.0.q"], modules["m.1.q"], modules["m.0.v"]
    assert (full.out_features, full.in_features, full.rank, full.alpha, full.scale) == (4, 5, 2, 4, 2)
    assert (full.norm, full.largest) == (pytest.approx(6 * math.sqrt(2)), pytest.approx(6))
    assert (full.effective_rank, full.stable_rank) == (pytest.approx(2), pytest.approx(2))
    assert (full.norm_a, full.norm_b) == (pytest.approx(math.sqrt(2)), pytest.approx(3 * math.sqrt(2)))
    assert (zero.norm, zero.effective_rank, zero.stable_rank) == (0, 0, 0)
    assert (single.scale, single.largest, single.dtype) == (3, pytest.approx(6), "bfloat16")
    assert (single.effective_rank, single.stable_rank) == (pytest.approx(1), pytest.approx(1))


def test_spectra_against_the_dense_product() -> None:
    values = torch.tensor([3.0, 1.0, 0.0])
    assert effective_rank(values) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert stable_rank(values) == pytest.approx(10 / 9)


def test_the_report_is_json(directory: Path) -> None:
    report = json.loads(json.dumps(inspect_adapter(directory).to_json(), allow_nan=False))
    assert report["config"]["method"]["rank"] == 2
    assert report["base"]["name"] == "tiny"
    assert report["manifest"] == {"score": 1}
    assert report["modules"][0]["path"] == "m.0.q"


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="has no adapter_config"):
        inspect_adapter(tmp_path)


def test_experts_are_measured_one_by_one(tmp_path: Path) -> None:
    handle = attach(mixture("mixtral"), AdapterConfig(targets=("gate_up_proj",), method=LoraMethod(rank=2)))
    fill(handle)
    value = handle.adapter("default")
    value.save(tmp_path / "a")
    first = inspect_adapter(tmp_path / "a").modules[0]
    assert (first.experts, first.out_features, first.in_features, first.rank) == (4, 48, 16, 2)
    parts = value.lower_by_expert(first.path)
    whole = value.lower(first.path).dense()
    assert torch.equal(torch.cat([part.dense() for part in parts]), whole)
    assert first.norm == pytest.approx(float(whole.norm()), rel=1e-5)
    assert first.largest == pytest.approx(max(float(torch.linalg.svdvals(part.dense())[0]) for part in parts), rel=1e-5)
    assert 1 <= first.stable_rank <= 2


def test_a_magnitude_is_told_beside_the_spectrum_of_its_pair(tmp_path: Path) -> None:
    handle = attach(tiny_llama(), AdapterConfig(targets=("q_proj",), method=DoraMethod(rank=2)), seed=0)
    fill(handle)
    parameters = handle.parameters("default")
    path = handle.paths("default")[0]
    parameters[f"{path}.magnitude"].data = torch.linspace(0.5, 2.0, 32)
    value = handle.adapter("default")
    value.save(tmp_path / "a")
    report = inspect_adapter(tmp_path / "a")
    first = report.modules[0]
    assert first.magnitude is not None
    assert (first.magnitude.values, first.magnitude.smallest, first.magnitude.largest) == (32, 0.5, 2.0)
    assert (first.rank, first.file_rank, first.parameters) == (2, 2, 2 * 64 + 32)
    product = first.scale * parameters[f"{path}.B"].data @ parameters[f"{path}.A"].data
    assert first.norm == pytest.approx(float(product.norm()), rel=1e-5)
    assert json.loads(json.dumps(report.to_json()))["modules"][0]["magnitude"]["values"] == 32
    with pytest.raises(AdapterError, match="has a DoRA magnitude"):
        value.lower(path)
    torch.testing.assert_close(value.pair(path).dense(), product)


def test_a_folded_start_shows_the_rank_of_the_file(tmp_path: Path) -> None:
    config = AdapterConfig(targets=("q_proj",), method=LoraMethod(rank=3, init="pissa"))
    handle = attach(tiny_llama(), config, seed=0)
    fill(handle)
    handle.adapter("default").save(tmp_path / "a")
    report = inspect_adapter(tmp_path / "a")
    assert report.config.method.init == "pissa"
    assert {(module.rank, module.file_rank) for module in report.modules} == {(3, 6)}
    assert (report.groups[0].file_rank_min, report.groups[0].file_rank_max) == (6, 6)
    assert report.modules[0].parameters == 2 * 3 * 64
    (tmp_path / "a/sideroad.json").unlink()
    again = inspect_adapter(tmp_path / "a")
    assert {(module.rank, module.file_rank) for module in again.modules} == {(6, 6)}
    assert again.modules[0].norm == pytest.approx(report.modules[0].norm, rel=1e-5)


def test_ranks_that_were_dealt_are_summed_up(directory: Path) -> None:
    assert inspect_adapter(directory).ranks == RankReport(2, 4, 8, 3, 0)
    left_out = ("m.9.*", r"re:m\.1\.v", r"re:m\..*\.w")
    config = AdapterConfig(targets=("q", "v"), exclude=left_out, method=LoraMethod(rank=2))
    assert ranks_of(Adapter(config, WEIGHTS)) == RankReport(2, 4, 8, 3, 1)
