"""Classification on a sentence encoder, for `bench/methods.py`: mean over the last layer, and a linear head.

In every method the head begins equal (its draw depends on the seed alone) and is trained whole, at one rate for all of
them; it is counted apart. The encoder's pooler, which nothing reads then, is taken away.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from method_table import Method, adapt
from method_tasks import HEAD_RATE, Budget, Classes, Task
from method_training import Subject, Turn, fit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from sideroad.base.config import BaseConfig
from sideroad.base.loading import Base, load_base, load_tokenizer
from sideroad.data.batches import plan_epoch
from sideroad.modes import in_eval_mode
from sideroad.train.evaluation import evenly, loss_batches
from sideroad.train.seeds import derive

EVALUATED_TOKENS = 8192
"""Tokens evaluated at a time, padding included."""


@dataclass(frozen=True)
class Rows:
    """A padded batch; `trained_tokens` counts labels, over which the loss is a mean."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    trained_tokens: int
    real_tokens: int


class Classifier(nn.Module):
    """An encoder with a linear head on the mean of its last hidden states, padding left out."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(derive(seed, "head"))
        with torch.no_grad():
            self.head.weight.normal_(std=0.02, generator=generator)
            self.head.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Return logits, [rows, classes], and the loss, summed over rows; labels are [rows]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        logits = self.head((hidden * mask).sum(dim=1) / mask.sum(dim=1))
        return SequenceClassifierOutput(loss=cross_entropy(logits, labels, reduction="sum"), logits=logits)


class EncoderRuns:
    """Cells of one classification task."""

    def __init__(self, task: Task, budget: Budget, data: Path) -> None:
        assert isinstance(task.source, Classes)
        self._task, self._budget, source = task, budget, task.source
        train, test = (_read(data / name) for name in (source.train, source.test))
        random.Random(0).shuffle(train)
        held_out, train = train[: budget.validation], train[budget.validation :]
        self._labels = sorted({row["label"] for row in train})
        tokenizer = load_tokenizer(BaseConfig(model=task.base))
        self._pad = tokenizer.pad_token_id
        texts = [[[row[column] for row in rows] for column in source.columns] for rows in (train, held_out, test)]
        encoded = [tokenizer(*each, truncation=True, max_length=source.max_length)["input_ids"] for each in texts]
        wanted = [[self._labels.index(row["label"]) for row in rows] for rows in (train, held_out, test)]
        pairs = [list(zip(*each, strict=True)) for each in zip(encoded, wanted, strict=True)]
        self._train, self._held_out, self._test = pairs[0], pairs[1], evenly(pairs[2], budget.test)

    def cell(self, method: Method, rate: float, seed: int, *, score: bool) -> dict[str, Any]:
        """Train once and evaluate: on the validation rows, or on the test rows where `score` says so."""
        base = load_base(BaseConfig(model=self._task.base, device="cpu"), dtype=torch.float32)
        subject = self._subject(method, seed, base)
        turns = islice(self._turns(seed), self._budget.steps)
        found = fit(subject, turns, method, rate, head_rate=HEAD_RATE, steps=self._budget.steps, seed=seed)
        rows, which = (self._test, "test") if score else (self._held_out, "validation")
        return {**found, which: self._evaluate(subject.model, rows)}

    def heaviest(self, method: Method, base: Base) -> None:
        """Train a loaded base for a few steps on the largest batches of the run, for the peak of memory."""
        turns = sorted(islice(self._turns(0), self._budget.steps), key=lambda turn: -turn[0].input_ids.numel())
        fit(self._subject(method, 0, base), turns[:3], method, 1e-6, head_rate=1e-6, steps=3, seed=0)

    def _subject(self, method: Method, seed: int, base: Base) -> Subject:
        base.model.pooler = None
        model = Classifier(base.model, base.model.config.hidden_size, len(self._labels), seed)
        # on the whole of it, so that inits see the loss; the head is no target
        adapted = adapt(model, method, derive(seed, "init"), lambda: self._for_inits(seed), exclude=("head",))
        head = {f"head.{name}": one for name, one in model.head.requires_grad_(True).named_parameters()}
        kept = {name: one for name, one in adapted.parameters.items() if name not in head}
        loss_of = lambda rows: model(rows.input_ids, rows.attention_mask, rows.labels).loss  # noqa: E731
        return Subject(model, replace(adapted, parameters=kept), loss_of, len(self._labels), head=head)

    def _for_inits(self, seed: int) -> list[dict[str, Tensor]]:
        found = (rows for rows, _ in islice(self._turns(seed), 8))
        return [
            {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "labels": rows.labels}
            for rows in found
        ]

    def _turns(self, seed: int) -> Iterator[Turn]:
        lengths = [len(ids) for ids, _ in self._train]
        shape = {"batch_size": self._budget.batch_size, "seed": derive(seed, "data")}
        for epoch in count():
            for chosen in plan_epoch(lengths, **shape, epoch=epoch, group_by_length=True, padded=True):
                yield self._lay_out([self._train[index] for index in chosen]), [str(index) for index in chosen]

    def _lay_out(self, rows: Sequence[tuple[list[int], int]]) -> Rows:
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([one + [self._pad] * (longest - len(one)) for one, _ in rows])
        mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one, _ in rows])
        return Rows(ids, mask, torch.tensor([label for _, label in rows]), len(rows), int(mask.sum()))

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> dict[str, float]:
        loss, right = 0.0, 0
        with in_eval_mode(model):
            for chosen in loss_batches([len(ids) for ids, _ in rows], EVALUATED_TOKENS):
                batch = self._lay_out([rows[index] for index in chosen])
                found = model(batch.input_ids, batch.attention_mask, batch.labels)
                loss += float(found.loss)
                right += int((found.logits.argmax(dim=-1) == batch.labels).sum())
        return {"accuracy": 100 * right / len(rows), "loss": loss / len(rows), "rows": len(rows)}


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
