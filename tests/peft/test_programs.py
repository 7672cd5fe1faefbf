"""Programs as PEFT's users write them, run with `peft` and with nothing but the import changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import quiet

from sideroad import peft as door

PROGRAMS = {file.stem: file for file in sorted((Path(__file__).parent / "programs").glob("*.py"))}
FAST = ("causal_lm", "several_adapters")
IMPORT = re.compile(r"^(\s*)(from|import) peft\b", re.MULTILINE)

Results = dict[str, list[float]]


def begin(library: Any) -> Callable[[Any], None]:
    """Give every pair the same start with both libraries (each draws its own), and the loop the same seed."""

    def fill(model: Any) -> None:
        for name in model.peft_config:
            state = library.get_peft_model_state_dict(model, adapter_name=name)
            draw = torch.Generator().manual_seed(5)
            for key in sorted(key for key in state if ".lora_A." in key):
                state[key] = torch.randn(state[key].shape, generator=draw) * 0.2
            library.set_peft_model_state_dict(model, state, adapter_name=name)
        torch.manual_seed(9)

    return fill


def run(name: str, folder: Path, *, ours: bool) -> Results:
    """Run a program's text as it is, or with its import changed."""
    text = PROGRAMS[name].read_text(encoding="utf-8")
    if ours:
        text, count = IMPORT.subn(r"\1\2 sideroad.peft", text)
        assert count == 1
    space: dict[str, Any] = {"__name__": f"program_{name}"}
    exec(compile(text, str(PROGRAMS[name]), "exec"), space)
    folder.mkdir()
    found: Results = space["main"](folder, begin(door if ours else peft))
    return found


def compare(name: str, folder: Path) -> None:
    with quiet():
        theirs = run(name, folder / "theirs", ours=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="(torch|transformers|accelerate)")
        ours = run(name, folder / "ours", ours=True)
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        left, right = torch.tensor(ours[key]), torch.tensor(values)
        assert left.shape == right.shape, key
        assert float((left - right).abs().max()) <= 1e-4 * float(right.abs().max()), key
    assert abs(ours["losses"][-1] - ours["losses"][0]) > 1e-2


@pytest.mark.parametrize("name", FAST)
def test_a_program_gives_the_same_with_its_import_changed(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)


@pytest.mark.all
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in FAST])
def test_every_program_gives_the_same_with_its_import_changed(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)
