"""Scores of generated answers against references: exact, JSON-aware, and the usual overlaps.

BLEU and chrF are sacrebleu's, from 0 to 100; everything else is a share from 0 to 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sideroad.train.evaluate_config import FIELD_METRIC

_MISSING = object()


def score(names: Sequence[str], outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return metric → value for each named metric (as `EvaluateConfig.metrics` spells them).

    Args:
        outputs: generated answers; `references` are theirs, in the same order. Empty: no metric is defined.
    """
    if len(outputs) != len(references):
        raise ValueError(f"{len(outputs)} outputs cannot be scored against {len(references)} references")
    if not outputs:
        return {}
    return {name: _metric(name)(outputs, references) for name in names}


def signatures(names: Sequence[str]) -> dict[str, str]:
    """Return sacrebleu's signature of each named metric that has one, so that scores can be compared elsewhere."""
    from sacrebleu.metrics import BLEU, CHRF

    kinds = {"bleu": BLEU, "chrf": CHRF}
    empty = {name: kinds[name]() for name in names if name in kinds}
    for metric in empty.values():
        metric.corpus_score(["a"], [["a"]])  # the number of references joins the signature on first use
    return {name: str(metric.get_signature()) for name, metric in empty.items()}


def exact_match(output: str, reference: str) -> bool:
    """Tell whether an answer is the reference.

    Where both are JSON objects or arrays they are compared as values: the order of keys, spaces and the spelling of
    numbers (`1`, `1.0`) do not count. Otherwise the texts must be equal but for white space at their ends.
    """
    left, right = _structure(output), _structure(reference)
    if left is not None and right is not None:
        return same_json(left, right)
    return output.strip() == reference.strip()


def json_valid(output: str) -> bool:
    """Tell whether an answer, spaces around it aside, is one JSON value as the standard has it (no NaN, no fences)."""
    return parse(output) is not _MISSING


def json_field(output: str, reference: str, name: str) -> bool:
    """Tell whether an answer is a JSON object whose field has the reference's value, or lacks it as the reference does.

    A reference that is not an object is never met.
    """
    left, right = parse(output), parse(reference)
    if not isinstance(left, dict) or not isinstance(right, dict):
        return False
    ours, theirs = left.get(name, _MISSING), right.get(name, _MISSING)
    return ours is theirs if ours is _MISSING or theirs is _MISSING else same_json(ours, theirs)


def same_json(left: Any, right: Any) -> bool:
    """Compare two parsed JSON values; unlike Python's `==`, `true` is not 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return bool(left == right)


def bleu(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of sacrebleu's defaults, 0 to 100 (Papineni et al. 2002; Post 2018, arXiv:1804.08771)."""
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score(list(outputs), [list(references)]).score)


def chrf(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 of sacrebleu's defaults, 0 to 100 (Popović 2015)."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(list(outputs), [list(references)]).score)


def rouge_l(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 without stemming, 0 to 1 (Lin 2004), as the rouge-score package computes it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, outputs, strict=True)
    return float(sum(scorer.score(reference, output)["rougeL"].fmeasure for reference, output in pairs) / len(outputs))


def parse(text: str) -> Any:
    """Return the JSON value of a text, or a sentinel that equals no JSON value."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _MISSING


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _structure(text: str) -> Any:
    value = parse(text)
    return value if isinstance(value, dict | list) else None


Metric = Callable[[Sequence[str], Sequence[str]], float]

_CORPUS: Mapping[str, Metric] = {"bleu": bleu, "chrf": chrf, "rouge_l": rouge_l}


def _metric(name: str) -> Metric:
    if name in _CORPUS:
        return _CORPUS[name]
    if name == "exact_match":
        return _share(exact_match)
    if name == "json_valid":
        return _share(lambda output, reference: json_valid(output))
    field = name.removeprefix(FIELD_METRIC)
    return _share(lambda output, reference: json_field(output, reference, field))


def _share(holds: Callable[[str, str], bool]) -> Metric:
    return lambda outputs, references: sum(map(holds, outputs, references)) / len(outputs)
