"""Metrics against values worked out by hand or given by their papers' tools."""

from __future__ import annotations

import pytest

from sideroad.config import validate
from sideroad.errors import ConfigError
from sideroad.train.evaluate_config import EvaluateConfig
from sideroad.train.task_metrics import exact_match, json_field, json_valid, same_json, score, signatures


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ('{"a": 1, "b": [2]}', '{ "b":[2.0],"a":1 }', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', '{"a": 1, "b": null}', False),
        ("[1, 2]", "[2, 1]", False),
        ("  Paris\n", "Paris", True),
        ("Paris", "paris", False),
        ("1.0", "1", False),  # bare numbers are text: only objects and arrays are compared as values
        ('{"a": 1}', "a is 1", False),
        ('{"a": 1', '{"a": 1', True),
        ("", "", True),
    ],
)
def test_exact_match(output: str, reference: str, expected: bool) -> None:
    assert exact_match(output, reference) is expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ('{"a": 1}', True),
        (' [1]\n', True),
        ('"x"', True),
        ("", False),
        ('{"a": NaN}', False),
        ("{'a': 1}", False),
        ('```json\n{"a": 1}\n```', False),
        ('{"a": 1} and more', False),
        ("[" * 100_000, False),
    ],
)
def test_json_valid(output: str, expected: bool) -> None:
    assert json_valid(output) is expected


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ('{"intent": "Play", "x": 1}', '{"intent": "Play"}', True),
        ('{"intent": "play"}', '{"intent": "Play"}', False),
        ('{"x": 1}', '{"intent": "Play"}', False),
        ('{"x": 1}', '{"y": 1}', True),
        ('{"intent": null}', '{"y": 1}', False),
        ('"Play"', '{"intent": "Play"}', False),
        ("Play", "Play", False),
        ('{"intent": {"b": 1, "a": 2}}', '{"intent": {"a": 2, "b": 1}}', True),
    ],
)
def test_json_field(output: str, reference: str, expected: bool) -> None:
    assert json_field(output, reference, "intent") is expected


def test_same_json_keeps_kinds_apart() -> None:
    assert same_json([1, {"a": None}], [1.0, {"a": None}])
    assert not same_json(0, False)
    assert not same_json(None, False)
    assert not same_json({"a": 1}, ["a"])
    assert not same_json([1], [1, 1])


def test_scores_are_shares_over_all_answers() -> None:
    outputs = ['{"intent": "A", "n": 1}', '{"intent": "B"}', "oops", '{"intent": "C", "n": 2}']
    references = ['{"n": 1, "intent": "A"}', '{"intent": "X"}', '{"intent": "A"}', '{"intent": "C", "n": 3}']
    found = score(("json_valid", "json_field:intent", "exact_match"), outputs, references)
    assert found == {"json_valid": 0.75, "json_field:intent": 0.5, "exact_match": 0.25}


def test_overlaps_equal_golden_values() -> None:
    outputs = ["the cat sat on the mat", "a dog ran in the park today"]
    references = ["the cat is on the mat", "a dog ran in the park today"]
    found = score(("bleu", "chrf", "rouge_l"), outputs, references)
    # Precisions 12/13, 9/11, 6/9 and 4/7 without brevity penalty: 100 * (12/13 * 9/11 * 6/9 * 4/7) ** 0.25.
    assert found["bleu"] == pytest.approx(100 * (12 / 13 * 9 / 11 * 6 / 9 * 4 / 7) ** 0.25)
    # Longest common subsequences 5 of 6 and 7 of 7.
    assert found["rouge_l"] == pytest.approx((5 / 6 + 1) / 2)
    assert score(("chrf",), references, references) == {"chrf": pytest.approx(100)}
    assert 80 < found["chrf"] < 95


def test_signatures_name_the_tool_and_its_settings() -> None:
    found = signatures(("bleu", "chrf", "exact_match"))
    assert list(found) == ["bleu", "chrf"]
    assert found["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "nc:6|nw:0" in found["chrf"]


def test_nothing_answered_gives_no_metric() -> None:
    assert score(("bleu", "exact_match"), [], []) == {}


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 outputs cannot be scored against 1 references"):
        score(("exact_match",), ["a", "b"], ["a"])


def test_unknown_metrics_are_all_named_with_the_nearest_one() -> None:
    values = {"metrics": ["exact_mach", "json_field:", "bleu", "bleu", "meteor"]}
    with pytest.raises(ConfigError) as caught:
        validate(EvaluateConfig, values, "r.yaml")
    text = str(caught.value)
    assert 'unknown metric "exact_mach". Did you mean "exact_match"?' in text
    assert "Allowed: loss, exact_match, json_valid, bleu, chrf, rouge_l, json_field:NAME" in text
    assert '"json_field:" names no field; write json_field:intent' in text
    assert '"bleu" is given twice' in text
    assert 'unknown metric "meteor"' in text


def test_the_loss_may_be_named_and_is_not_a_task_metric() -> None:
    assert EvaluateConfig(metrics=("loss", "json_field:intent")).metrics == ("json_field:intent",)
