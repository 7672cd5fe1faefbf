"""survey: what a model consists of, which kinds there are, and what a configuration means in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import nn

from sideroad.attaching import attach
from sideroad.config import AdapterConfig, LoraMethod
from sideroad.errors import TargetError
from sideroad.survey import Survey
from sideroad.targets import resolve


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8))])
        self.head = nn.Linear(8, 9)
        self.again = self.head


def select(config: AdapterConfig, model: nn.Module | None = None) -> list[str]:
    findings: list[str] = []
    found = Survey(model or Mixed()).select(config, findings)
    assert findings == []
    return found


def refused(**config: Any) -> str:
    with pytest.raises(TargetError) as caught:
        resolve(Mixed(), AdapterConfig(**{"method": LoraMethod(rank=2), **config}))
    return str(caught.value)


def test_reads_every_kind_under_its_first_path() -> None:
    read = Survey(Mixed())
    assert {path: type(kind).__name__ for path, kind in read.kinds.items()} == {
        "embed": "Embedding",
        "conv": "Convolution",
        "attention": "InProjection",
        "attention.out_proj": "OutProjection",
        "blocks.0.0": "Linear",
        "blocks.1.0": "Linear",
        "head": "Linear",
    }
    assert list(read.linear) == ["attention", "attention.out_proj", "blocks.0.0", "blocks.1.0", "head"]
    assert read.canonical["again"] == "head"
    assert read.heads == {"head"}
    assert read.found() == "Layers found: embed, conv, attention, out_proj, 0, head."


def test_adapters_are_not_looked_at() -> None:
    model = Mixed()
    before = list(Survey(model).modules)
    attach(model, AdapterConfig(targets=("embed", "attention", "head"), modules_to_save=("norm",),
                                method=LoraMethod(rank=2)))  # fmt: skip
    assert list(Survey(model).modules) == before


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    assert select(AdapterConfig()) == ["attention", "attention.out_proj", "blocks.0.0", "blocks.1.0"]
    assert select(AdapterConfig(targets=("all-linear", "embed", "again"))) == [
        "embed", "attention", "attention.out_proj", "blocks.0.0", "blocks.1.0", "head"
    ]  # fmt: skip
    assert select(AdapterConfig(exclude=("attention", "*.out_proj"))) == ["blocks.0.0", "blocks.1.0"]
    assert select(AdapterConfig(layers=(1,))) == ["blocks.1.0"]
    assert not any("lm_head" in path for path in select(AdapterConfig(), tiny_llama()))


def test_what_is_trained_whole_is_no_target_and_has_no_bias_of_its_own() -> None:
    config = AdapterConfig(modules_to_save=("blocks", "norm"), bias="all")
    read = Survey(Mixed())
    assert read.whole(config, []) == ["norm", "blocks.0.0", "blocks.1.0"]
    assert read.select(config, []) == ["attention", "attention.out_proj"]
    assert read.biases(config, ()) == ("conv", "attention.out_proj", "head")
    assert read.biases(AdapterConfig(), ("head",)) == ()


def test_outermost_modules_stand_for_what_is_inside() -> None:
    read = Survey(Mixed())
    assert read.whole(AdapterConfig(modules_to_save=("attention", "*.out_proj")), []) == ["attention"]
    assert read.whole(AdapterConfig(modules_to_save=("again",)), []) == ["head"]
    assert read.parts("blocks") == ["blocks.0.0", "blocks.1.0"]
    assert read.parts("blocks.0.1") == []
    assert read.uncalled("attention") is None
    assert "attention reads" in (read.uncalled("attention.out_proj") or "")


def test_rows_are_of_embeddings_and_heads_and_the_first_pattern_counts() -> None:
    read = Survey(Mixed())
    config = AdapterConfig(targets=(), trainable_tokens={"head": (2,), "*e*": (1, 3)})
    assert read.rows(config, []) == {"embed": (1, 3), "head": (2,)}
    text = refused(targets=(), trainable_tokens={"again": (2,)})
    assert "means again, which is head by another path; name it" in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"targets": "norm"}, 'target "norm" means LayerNorm (norm) in Mixed, which cannot be adapted; allowed: nn.Li'),
        ({"targets": "hed"}, 'target "hed" matches no layer of Mixed.\n  Layers found: embed, conv'),
        ({"targets": "hed"}, 'Did you mean "head"?'),
        ({"exclude": ("norm",)}, 'exclude "norm" names no layer but LayerNorm (norm); a glob such as "*norm.*" covers'),
        ({"exclude": ("nothing",)}, 'exclude "nothing" matches no layer of Mixed'),
        ({"targets": (), "modules_to_save": ("hed",)}, 'modules_to_save "hed" matches no module of Mixed. Did you'),
        ({"targets": (), "modules_to_save": ("blocks.0.1",)}, "means blocks.0.1, which has no parameters"),
        ({"layers": (7,)}, "layers asks for 7, but Mixed has blocks 0-1 only"),
        ({"layers_pattern": "blocks"}, "layers_pattern is set without layers"),
        ({"targets": "embed", "bias": "adapted"}, 'bias is "adapted", but no adapted layer of Mixed has a bias'),
    ],
)
def test_what_a_configuration_gets_wrong_is_said(config: Any, words: str) -> None:
    assert words in refused(**config)


def test_everything_wrong_is_said_at_once_and_allow_unmatched_passes_what_means_nothing() -> None:
    wrong = {
        "targets": ("head", "nothing"),
        "exclude": ("neither",),
        "modules_to_save": ("nowhere",),
        "trainable_tokens": {"nobody": (1,)},
    }
    text = refused(**wrong)
    for name in ("nothing", "neither", "nowhere", "nobody"):
        assert f'"{name}"' in text
    found = resolve(Mixed(), AdapterConfig(**wrong, allow_unmatched=True, method=LoraMethod(rank=2)))
    assert list(found) == ["head"]


def test_meta_models_can_be_read() -> None:
    with torch.device("meta"):
        read = Survey(Mixed())
    assert len(read.kinds) == 7
