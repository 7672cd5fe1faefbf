"""Files that old PEFT versions wrote (tests/golden): read by us and by today's PEFT, to the outputs recorded then."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from golden.bases import build, outputs
from safetensors import safe_open
from torch import Tensor, nn

from sideroad.adapter import Adapter
from sideroad.attaching import attach
from sideroad.errors import AdapterError
from sideroad.peft_fields import REFUSED
from sideroad.tensor_files import read_tensors, same_bits

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("peft-*/*/expected.safetensors"))
LOST = {"peft-0.11.1/bias-adapted", "peft-0.15.2/bias-adapted"}
"""Those versions trained the biases of adapted layers and left them out of the file."""


KINDS: dict[str, tuple[Callable[[], bool], str]] = {
    "slices": (lambda: True, ""),
    "modules": (lambda: True, ""),
    "tokens": (lambda: True, ""),
    "dora": (lambda: "use_dora" not in REFUSED, "use_dora is set"),
    "pair bias": (lambda: "lora_bias" not in REFUSED, "lora_bias is set"),
    "embedding": (lambda: True, ""),
    "conv": (lambda: True, ""),
    "attention": (lambda: True, ""),
}
"""What a case needs beyond pairs on linear layers → whether the core has it, and the words of its refusal if not."""

BEFORE_BASE_LAYER = ("peft-0.1.0", "peft-0.2.0", "peft-0.3.0", "peft-0.4.0", "peft-0.6.2")
PEFT_TODAY: dict[str, str | None] = {
    **{f"{version}/bias-{which}": None for version in BEFORE_BASE_LAYER for which in ("adapted", "all")},
    **{f"{version}/bare-suffix": "not found in the base model" for version in BEFORE_BASE_LAYER},
    **{f"peft-{v}/slices-{what}": "size mismatch" for v in ("0.1.0", "0.2.0") for what in ("qv", "qkv", "linear")},
    "peft-0.15.2/grouped": "size mismatch",
}
"""Cases that today's PEFT cannot read → the words of its error; None: it passes over the biases without a word."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def expected(case: str) -> tuple[dict[str, Tensor], str, list[str]]:
    """Return the recorded tensors, the base's name and the kinds of a case."""
    file = GOLDEN / case / "expected.safetensors"
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["case"])
    return read_tensors(file), about["base"], about["kinds"]


def refusals(case: str) -> list[str]:
    """Return the words with which the core refuses a case, none if it has all that the case needs."""
    return [words for kind in expected(case)[2] for has, words in [KINDS[kind]] if not has()]


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs agree to 1e-5 of their size."""
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def lively(base: str, recorded: dict[str, Tensor]) -> nn.Module:
    """Return the base after checking that the adapter changes what it says."""
    model = build(base)
    assert not close(outputs(model, recorded["input"]), recorded["reloaded"])
    return model


def test_every_version_and_kind_is_there() -> None:
    versions = {case.split("/")[0] for case in CASES}
    assert versions == {f"peft-{v}" for v in ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.6.2", "0.11.1", "0.15.2")}
    assert {kind for case in CASES for kind in expected(case)[2]} == set(KINDS)


@pytest.mark.parametrize("case", CASES)
def test_an_old_file_gives_the_outputs_recorded_then_and_so_does_our_copy(case: str, tmp_path: Path) -> None:
    recorded, base, _ = expected(case)
    words = refusals(case)
    if words:
        with pytest.raises(AdapterError, match=re.escape(words[0])):
            Adapter.load(GOLDEN / case)
        return
    model, second = lively(base, recorded), build(base)
    attach(model, Adapter.load(GOLDEN / case))
    assert close(outputs(model, recorded["input"]), recorded["reloaded"])
    Adapter.load(GOLDEN / case).save(tmp_path / "copy")
    attach(second, Adapter.load(tmp_path / "copy"))
    assert close(outputs(second, recorded["input"]), recorded["reloaded"])
    assert close(recorded["trained"], recorded["reloaded"]) == (case not in LOST)


@pytest.mark.parametrize("case", CASES)
def test_peft_of_today_reads_the_same(case: str) -> None:
    peft = pytest.importorskip("peft")
    recorded, base, _ = expected(case)
    model = lively(base, recorded)
    words = PEFT_TODAY.get(case)
    if words:
        with pytest.raises((ValueError, RuntimeError), match=words):
            peft.PeftModel.from_pretrained(model, GOLDEN / case)
        return
    model = peft.PeftModel.from_pretrained(model, GOLDEN / case).eval()
    assert close(outputs(model, recorded["input"]), recorded["reloaded"]) == (case not in PEFT_TODAY)


def test_a_pickle_is_refused_and_the_printed_lines_convert_it(tmp_path: Path) -> None:
    directory = tmp_path / "old"
    shutil.copytree(GOLDEN / "peft-0.1.0/pickle", directory)
    with pytest.raises(AdapterError, match="is a pickle, which can run code when it is opened") as caught:
        Adapter.load(directory)
    printed = str(caught.value).split("Convert it once:\n")[1].split("\nThen remove adapter_model.bin")[0]
    exec(textwrap.dedent(printed), {})
    (directory / "adapter_model.bin").unlink()
    converted, kept = (read_tensors(p / "adapter_model.safetensors") for p in (directory, GOLDEN / "peft-0.1.0/names"))
    assert set(converted) == set(kept)
    assert all(same_bits(converted[key], kept[key]) for key in kept)
    assert Adapter.load(directory).same_weights(Adapter.load(GOLDEN / "peft-0.1.0/names"))
