"""A data set ready to train on: encoded rows, what they came from, their statistics and findings."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sideroad.data.config import DataConfig
from sideroad.data.encode import Encoded, Outcome, encode_examples
from sideroad.data.findings import Finding, examine, overlap
from sideroad.data.formats import Layout, detect, read_examples
from sideroad.data.messages import Example
from sideroad.data.readers import Row
from sideroad.data.sources import Split, read_source
from sideroad.data.template import Template, open_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("sideroad.data")
_REASONS = ("refused", "overlong", "dropped", "nothing-trained")


@dataclass(frozen=True)
class Statistics:
    """Counts over one data set; lengths in tokens, after any cut.

    Attributes:
        rows: rows in the files (after `limit`).
        sequences: what is trained on; fewer than rows where some are left out, more where texts are split.
        left_out: rows that contribute nothing, by reason (finding codes).
        truncated: rows that were cut, by kind (finding codes).
    """

    rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    length_min: int
    length_median: int
    length_p95: int
    length_max: int
    left_out: Mapping[str, int]
    truncated: Mapping[str, int]

    @property
    def trained_fraction(self) -> float:
        """Trained tokens over all tokens; 0 for an empty set."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the plain mapping for reports."""
        return {**asdict(self), "trained_fraction": self.trained_fraction}


@dataclass(frozen=True)
class DataSet:
    """Rows of one kind, encoded.

    Attributes:
        examples: every sequence with at least one trained token, in file order.
        raw: the example each sequence came from, same order and length (a split text stands there repeatedly).
        format: what the rows are (`chat`, `alpaca` …).
        layout: the same with the column mapping.
        sha256: of all ids and marks, the same on every machine.
        files: file name → sha256 of its bytes.
    """

    examples: tuple[Encoded, ...]
    raw: tuple[Example, ...]
    format: str
    layout: Layout
    sha256: str
    files: Mapping[str, str]
    findings: tuple[Finding, ...]
    statistics: Statistics

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per sequence, for `plan_epoch`."""
        return tuple(len(item) for item in self.examples)


@dataclass(frozen=True)
class Loaded:
    """A recipe's data.

    Attributes:
        findings: those of train, then those of validation (their message says so), then those about both.
    """

    train: DataSet
    validation: DataSet | None
    findings: tuple[Finding, ...]


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    root: Path = Path(),
    offline: bool = False,
    max_positions: int | None = None,
) -> Loaded:
    """Read, understand, encode and examine a recipe's data.

    Findings are returned, not raised, so that they can be shown; `findings.refuse` raises on errors among them.

    Args:
        root: where relative paths start (the recipe file's directory).
        offline: use hub sets only from the local cache.
        max_positions: the model's longest sequence; longer rows are an error finding.
    Raises:
        DataError: a source is missing or unreadable, the format is unknown or ambiguous, or rows do not fit it; with
            file and line, up to 20 at once.
    """
    template = open_template(tokenizer, config, root)
    rows, files = _rows(config.train_sources, config.limit, "train", root, offline)
    train, trained = _encode(rows, files, template, config, max_positions)
    if config.validation is None:
        return Loaded(train, None, train.findings)
    rows, files = _rows((config.validation,), config.validation_limit, "validation", root, offline)
    validation, held_out = _encode(rows, files, template, config, max_positions)
    of_validation = [replace(finding, message=f"validation: {finding.message}") for finding in validation.findings
                     if finding.code not in ("few-rows", "dated-template")]
    return Loaded(train, validation, (*train.findings, *of_validation, *overlap(trained, held_out)))


def _rows(
    sources: Sequence[str], limit: int | None, split: Split, root: Path, offline: bool
) -> tuple[list[Row], dict[str, str]]:
    rows: list[Row] = []
    files: dict[str, str] = {}
    for source in sources:
        read = read_source(source, root=root, split=split, offline=offline)
        rows.extend(read.rows)
        for name, digest in read.files.items():
            # Two directories may hold files of one name.
            files[name if name not in files else f"{source}/{name}"] = digest
    return rows[:limit], files


def _encode(
    rows: Sequence[Row], files: Mapping[str, str], template: Template, config: DataConfig, max_positions: int | None
) -> tuple[DataSet, list[Outcome]]:
    layout = detect(rows, config)
    examples = read_examples(rows, layout, templated=template.chat)
    _log.info("%s: %d rows, %s", ", ".join(files), len(rows), layout.describe())
    outcomes = list(encode_examples(examples, template, config))
    pairs = [(item, outcome.example) for outcome in outcomes for item in outcome.encoded]
    told = Finding("columns", "note", f"{', '.join(files)}: {layout.describe()}", count=len(rows))
    encoded = tuple(item for item, _ in pairs)
    dataset = DataSet(
        examples=encoded,
        raw=tuple(example for _, example in pairs),
        format=layout.format,
        layout=layout,
        sha256=content_hash(encoded),
        files=files,
        findings=(told, *examine(outcomes, template, config, max_positions)),
        statistics=_statistics(outcomes),
    )
    return dataset, outcomes


def content_hash(examples: Sequence[Encoded]) -> str:
    """Return the sha256 of all ids and marks, in order, independent of the machine's byte order."""
    digest = hashlib.sha256()
    for item in examples:
        digest.update(json.dumps([len(item.ids), item.ids], separators=(",", ":")).encode())
        digest.update(array("B", item.trained).tobytes())
    return digest.hexdigest()


def _statistics(outcomes: Sequence[Outcome]) -> Statistics:
    encoded = [item for outcome in outcomes for item in outcome.encoded]
    lengths = sorted(len(item) for item in encoded) or [0]
    left_out: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    for outcome in outcomes:
        if not outcome.encoded:
            left_out[next(code for code in _REASONS if code in outcome.remarks)] += 1
        truncated.update(code for code in outcome.remarks if code.startswith("truncated-"))
    return Statistics(
        rows=len(outcomes),
        sequences=len(encoded),
        tokens=sum(lengths),
        trained_tokens=sum(item.trained_tokens for item in encoded),
        length_min=lengths[0],
        length_median=lengths[(len(lengths) - 1) // 2],
        length_p95=lengths[int((len(lengths) - 1) * 0.95)],
        length_max=lengths[-1],
        left_out=dict(sorted(left_out.items())),
        truncated=dict(sorted(truncated.items())),
    )
