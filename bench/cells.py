"""What `bench/train.py` trains on: cells, each a list of batches with the same token ids and marks for every side.

Rows are encoded by sideroad's own `load_data`; peers get its ids and its mask of trained tokens. A cell is either
blocks of one length, cut from running text, or rows of chat in random batches. Sets other than the quick start's are
not in the repository: they lie in the directory given by `--data`, and a cell without its set is skipped.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import Any

from sideroad.data.batches import plan_epoch
from sideroad.data.config import DataConfig
from sideroad.data.dataset import load_data
from sideroad.data.encode import Encoded

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples/quickstart/train.jsonl"
BATCH_SIZE = 8
SEED = 0
FEW_HUNDRED = 400
"""Rows taken from the top of a set that is not in the repository."""

TASK = (
    "You turn one spoken command into JSON. Answer with a single object on one line and nothing else. Its first key is "
    "intent; every other key names a slot that the command fills, with the words of the command as its value. Leave "
    "out slots the command does not mention."
)
"""A system message of 50 words, as a user with a task writes it."""

Rows = Sequence[Encoded]
Batches = Sequence[Rows]


@dataclass(frozen=True)
class Blocks:
    """Batches of blocks that have one length, so nothing is padded.

    Attributes:
        rows: blocks in a batch.
        length: tokens in a block.
        trained_from: first token of a block whose prediction is trained.
    """

    what: str
    rows: int
    length: int
    trained_from: int


@dataclass(frozen=True)
class Chat:
    """Rows of chat in random batches of eight.

    Attributes:
        file: JSON lines below the data directory; empty: the quick start's, as they are.
        columns: names of prompt and answer in that file.
        system: as `data.system` of a recipe.
        max_length: longer rows are cut at the end.
    """

    what: str
    file: str = ""
    columns: tuple[str, str] = ("prompt", "completion")
    system: str | None = None
    max_length: int = 512


_DOLLY = ("dolly_hhrlhf_small/train.jsonl", ("prompt", "response"))
CELLS: dict[str, Blocks | Chat] = {
    "1x512-half": Blocks("one sequence of 512 tokens, its second half trained", 1, 512, 256),
    "2x512-all": Blocks("two sequences of 512 tokens, all trained", 2, 512, 1),
    "quickstart": Chat("quick start rows under the template's own system prompt, random batches of 8"),
    "quickstart-task": Chat("the same rows under a task prompt of 50 words", system=TASK),
    "e2e": Chat("E2E NLG as chat, random batches of 8", "e2e_nlg/train_5k.jsonl", ("mr", "ref")),
    "gsm8k": Chat("GSM8K as chat, random batches of 8", "gsm8k/train.jsonl", ("question", "answer")),
    "dolly-400": Chat("dolly as chat, cut at 400 tokens, random batches of 8", *_DOLLY, max_length=400),
    "dolly-1024": Chat("dolly as chat, cut at 1024 tokens, random batches of 8", *_DOLLY, max_length=1024),
}


def missing(name: str, data: Path) -> Path | None:
    """Return the file that a cell needs and that is not there; None if it can be measured."""
    cell = CELLS[name]
    if isinstance(cell, Blocks) or not cell.file or (data / cell.file).exists():
        return None
    return data / cell.file


def batches(name: str, tokenizer: Any, data: Path, count: int) -> list[list[Encoded]]:
    """Return `count` full batches of a cell, the same on every call.

    Args:
        data: directory of the sets that are not in the repository.
    """
    cell = CELLS[name]
    if isinstance(cell, Blocks):
        return _blocks(cell, tokenizer, count)
    examples = _encoded(cell, tokenizer, data)
    return list(islice(_random_batches(examples), count))


def padded_tokens(rows: Rows) -> int:
    """Return the tokens of a batch as a padding collator lays it out."""
    return len(rows) * max(len(row) for row in rows)


def real_tokens(rows: Rows) -> int:
    """Return the tokens of a batch that are not padding."""
    return sum(len(row) for row in rows)


def _blocks(cell: Blocks, tokenizer: Any, count: int) -> list[list[Encoded]]:
    examples = load_data(DataConfig(train=str(QUICKSTART)), tokenizer).train.examples
    tokens = [token for example in examples for token in example.ids]
    wanted = count * cell.rows * cell.length
    tokens *= -(-wanted // len(tokens))
    marks = [at >= cell.trained_from for at in range(cell.length)]
    pieces = [Encoded(tokens[at : at + cell.length], marks, "text") for at in range(0, wanted, cell.length)]
    return [pieces[at : at + cell.rows] for at in range(0, count * cell.rows, cell.rows)]


def _encoded(cell: Chat, tokenizer: Any, data: Path) -> Sequence[Encoded]:
    settings = {"system": cell.system, "max_length": cell.max_length, "overlong": "truncate-end"}
    if not cell.file:
        return load_data(DataConfig(train=str(QUICKSTART), **settings), tokenizer).train.examples
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder, "chat.jsonl")
        converted.write_text(_as_chat(data / cell.file, cell.columns), encoding="utf-8")
        return load_data(DataConfig(train=str(converted), **settings), tokenizer).train.examples


def _as_chat(path: Path, columns: tuple[str, str]) -> str:
    """The first rows of a file as lines of chat messages."""
    lines = []
    with path.open(encoding="utf-8") as file:
        for row in islice(map(json.loads, file), FEW_HUNDRED):
            turns = zip(("user", "assistant"), columns, strict=True)
            lines.append(json.dumps({"messages": [{"role": who, "content": row[key]} for who, key in turns]}))
    return "\n".join(lines) + "\n"


def _random_batches(examples: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    """Full batches in random order, epoch after epoch."""
    lengths = [len(example) for example in examples]
    for epoch in numbers():
        for batch in plan_epoch(lengths, batch_size=BATCH_SIZE, seed=SEED, epoch=epoch):
            if len(batch) == BATCH_SIZE:
                yield [examples[index] for index in batch]
