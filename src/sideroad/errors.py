"""Every error sideroad raises on purpose, and the exit code its command line gives for it.

    SideroadError                1   anything below; also what to catch
    ├── ConfigError              2   a recipe or adapter configuration: unknown key, wrong type, contradiction
    ├── DataError                3   a data set: missing, broken line, nothing to train on
    ├── BaseModelError           4   a base model: unknown name, failed download, wrong checksum, unreadable
    ├── AdapterError             5   an adapter: its files, its name, its fit to a model
    │   ├── TargetError          5   targets that match nothing, or a layer that cannot be adapted
    │   └── MergeError           5   a merge that would be wrong, or a merged state used as if it were not
    └── TrainingError            6   a run: non-finite loss, no gradient, no isolation
        └── CheckpointError      6   a checkpoint or run directory: torn, foreign, in use

Exit code 0 is success, 1 an unexpected failure, 130 an interrupt that left a resumable run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class SideroadError(Exception):
    """Root of the tree. The message says what is wrong, what was found, what is allowed and how to mend it."""

    exit_code = 1


class ConfigError(SideroadError):
    """A recipe or adapter configuration is wrong."""

    exit_code = 2


class DataError(SideroadError):
    """A data set cannot be used as it is."""

    exit_code = 3


class BaseModelError(SideroadError):
    """A base model cannot be found, fetched, checked or read."""

    exit_code = 4


class AdapterError(SideroadError):
    """An adapter's files, name or tensors do not fit."""

    exit_code = 5


class TargetError(AdapterError):
    """Targets match nothing, or a matched layer cannot be adapted."""


class MergeError(AdapterError):
    """A merge would give wrong weights, or the merged state forbids the request."""


class TrainingError(SideroadError):
    """A run cannot go on."""

    exit_code = 6


class CheckpointError(TrainingError):
    """A checkpoint or run directory is torn, foreign or in use."""


def raise_findings(kind: type[SideroadError], summary: str, findings: Sequence[str]) -> None:
    """Raise one `kind` that lists every finding; do nothing when there is none.

    Args:
        summary: what was examined, without a full stop; heads the list when there are several findings.
        findings: one complete message each.
    """
    if len(findings) == 1:
        raise kind(findings[0])
    if findings:
        listed = "\n".join(f"  - {finding}" for finding in findings)
        raise kind(f"{summary}: {len(findings)} problems.\n{listed}")


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the closest allowed word, or an empty string."""
    close = get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
