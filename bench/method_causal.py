"""Prompts and answers on a causal model, for `bench/methods.py`, with data and step of `sideroad train`.

Packing and the fast path are what a run of the library would choose. Full fine-tuning takes the same step on the same
batches; it goes the plain path, since the fast one is for frozen weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from method_table import Method, adapt, config_of
from method_tasks import ROOT, Answers, Budget, Task
from method_training import Subject, Turn, fit
from sacrebleu.metrics import BLEU
from torch import Tensor

from sideroad.base.config import BaseConfig
from sideroad.base.generation import generate
from sideroad.base.loading import Base, load_base, load_tokenizer
from sideroad.data.config import NO_SYSTEM, DataConfig
from sideroad.data.dataset import Loaded, load_data
from sideroad.data.template import encode_prompt
from sideroad.kernels.isolation import choose_route, packing
from sideroad.train.choosing import choose_execution
from sideroad.train.evaluation import evenly, mean_loss
from sideroad.train.execution import Execution
from sideroad.train.init_batches import init_batches
from sideroad.train.order import Order
from sideroad.train.seeds import derive
from sideroad.train.settings import OptimConfig, TrainConfig
from sideroad.train.task_metrics import score as score_answers

EPOCHS = 100
"""More than any budget reaches; the steps end a run."""


class CausalRuns:
    """Cells of one task of prompts and answers."""

    def __init__(self, task: Task, budget: Budget, data: Path) -> None:
        assert isinstance(task.source, Answers)
        self._task, self._budget, self._source = task, budget, task.source
        folder = ROOT if task.source.committed else data
        train = _read(folder / task.source.train)
        if task.source.validation:
            held_out = evenly(_read(folder / task.source.validation), budget.validation)
        else:
            held_out, train = train[-budget.validation :], train[: -budget.validation]
        self._test = evenly(_read(folder / task.source.test), budget.test)
        self._tokenizer = load_tokenizer(BaseConfig(model=task.base))
        self._data = self._load(train, held_out)

    def cell(self, method: Method, rate: float, seed: int, *, score: bool) -> dict[str, Any]:
        """Train once and evaluate: the loss on held-out rows, or answers to the test rows where `score` says so."""
        base = load_base(BaseConfig(model=self._task.base, device="cpu"), dtype=torch.float32)
        subject, execution = self._subject(method, seed, base)
        turns = islice(self._turns(seed, execution), self._budget.steps)
        found = fit(subject, turns, method, rate, head_rate=rate, steps=self._budget.steps, seed=seed)
        if score:
            return {**found, "test": self._score(base)}
        assert self._data.validation is not None
        with packing(base.model, execution.route):
            loss, tokens = mean_loss(base, self._data.validation.examples, packed=execution.route.isolates)
        return {**found, "validation": {"loss": loss, "tokens": tokens}}

    def heaviest(self, method: Method, base: Base) -> None:
        """Train a loaded base for a few steps on the largest batches of the run, for the peak of memory."""
        subject, execution = self._subject(method, 0, base)
        turns = sorted(islice(self._turns(0, execution), self._budget.steps), key=lambda turn: -turn[0].real_tokens)
        fit(subject, turns[:3], method, 1e-6, head_rate=1e-6, steps=3, seed=0)

    def _subject(self, method: Method, seed: int, base: Base) -> tuple[Subject, Execution]:
        adapted = adapt(base.model, method, derive(seed, "init"), lambda: self._for_inits(method, seed))
        config = TrainConfig(fast=method.trains == "adapter", compile="off")
        execution = choose_execution(base.model, choose_route(base.model), config, pad_id=self._pad)
        vocabulary = base.model.config.vocab_size
        subject = Subject(base.model, adapted, execution.loss_of, vocabulary, running=execution.running)
        return subject, execution

    @property
    def _pad(self) -> int:
        return int(self._tokenizer.pad_token_id)

    def _order(self, seed: int, *, packed: bool) -> Order:
        optim = OptimConfig(batch_size=self._budget.batch_size)
        return Order(self._data.train.lengths, optim, seed=derive(seed, "data"), packed=packed)

    def _turns(self, seed: int, execution: Execution) -> Iterator[Turn]:
        examples = self._data.train.examples
        order = self._order(seed, packed=execution.route.isolates)
        for step in order.steps(TrainConfig(epochs=EPOCHS, max_steps=self._budget.steps)):
            rows = [examples[index] for index in step[0]]
            yield execution.lay_out(rows), [row.source for row in rows]

    def _for_inits(self, method: Method, seed: int) -> Sequence[dict[str, Tensor]]:
        return init_batches(
            config_of(method).method.init,
            self._data.train.examples,
            size=self._budget.batch_size,
            pad_id=self._pad,
            seed=derive(seed, "init data"),
            device=torch.device("cpu"),
        ) or ()

    def _load(self, train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> Loaded:
        with tempfile.TemporaryDirectory() as folder:
            files = {"train": train, "validation": held_out}
            for name, rows in files.items():
                lines = [json.dumps({"prompt": row[self._prompt], "completion": self._answer(row)}) for row in rows]
                Path(folder, f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            sources = {name: str(Path(folder, f"{name}.jsonl")) for name in files}
            return load_data(DataConfig(**sources, system=NO_SYSTEM), self._tokenizer)

    @property
    def _prompt(self) -> str:
        return self._source.columns[0]

    def _answer(self, row: dict[str, Any]) -> str:
        """The answer that is trained on; of several references the first."""
        column = self._source.columns[1]
        return str(row[column] if column in row else row[self._source.references][0])

    def _score(self, base: Base) -> dict[str, float]:
        config = DataConfig(train="unused", system=NO_SYSTEM)
        asked = [[{"role": "user", "content": row[self._prompt]}] for row in self._test]
        prompts = [encode_prompt(each, self._tokenizer, config) for each in asked]
        found = generate(base, prompts, max_new_tokens=self._source.max_new_tokens, batch_size=49)
        outputs = [str(text) for text in self._tokenizer.batch_decode(found, skip_special_tokens=True)]
        if self._source.references:
            references = [row[self._source.references] for row in self._test]
            return {"bleu": bleu(outputs, references), "rows": len(outputs)}
        names = ("exact_match", "json_field:intent")
        shares = score_answers(names, outputs, [self._answer(row) for row in self._test])
        return {**{name: 100 * share for name, share in shares.items()}, "rows": len(outputs)}


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU-4 over several references, lower-cased, 13a tokens: the number that e2e-metrics prints, x 100.

    On the ten lines of that program's own fixture this gives its 72.03.
    """
    most = max(map(len, references))
    streams = [[each[at] if at < len(each) else None for each in references] for at in range(most)]
    return float(BLEU(lowercase=True, force=True).corpus_score(list(outputs), streams).score)


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
