"""Samples of what will be trained on, as text with the trained parts told apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from sideroad.data.encode import Encoded
from sideroad.data.template import shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sideroad.data.dataset import DataSet


@dataclass(frozen=True)
class PreviewSample:
    """One sequence as text.

    Attributes:
        source: where the row came from.
        runs: (text, trained) pieces; joined they are the decoded sequence, special tokens included.
        tokens: length of the sequence.
        trained_tokens: how many of them the loss counts.
    """

    source: str
    runs: tuple[tuple[str, bool], ...]
    tokens: int
    trained_tokens: int


def preview(dataset: DataSet, tokenizer: PreTrainedTokenizerBase, n: int = 3, seed: int = 0) -> list[PreviewSample]:
    """Return `n` samples drawn without repetition, in file order; all of them if there are fewer."""
    generator = random.Random(f"sideroad preview {seed}")
    drawn = sorted(range(len(dataset.examples)), key=lambda index: (generator.random(), index))[: max(n, 0)]
    return [sample_of(dataset.examples[index], tokenizer) for index in sorted(drawn)]


def sample_of(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> PreviewSample:
    """Return one sequence as text runs.

    A character whose bytes are spread over tokens on both sides of a border belongs to the later run.
    """
    whole = decode(encoded.ids, tokenizer)
    borders = [0, *(k for k in range(1, len(encoded)) if encoded.trained[k] != encoded.trained[k - 1]), len(encoded)]
    cuts = [0]
    for border in borders[1:-1]:
        begun = decode(encoded.ids[:border], tokenizer)
        # An unfinished character decodes to U+FFFD; where the whole has one in that place, it is really there.
        cuts.append(max(cuts[-1], shared_length(begun, whole)))
    cuts.append(len(whole))
    runs = tuple(
        (whole[begin:end], encoded.trained[border])
        for (begin, end), border in zip(pairwise(cuts), borders, strict=False) if end > begin
    )
    return PreviewSample(encoded.source, runs, len(encoded), encoded.trained_tokens)


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of ids with special tokens shown and nothing tidied up."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
