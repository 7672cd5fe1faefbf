"""How good a model is on a data set: its loss, task metrics on generated answers, and a few of those to read."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sideroad.base.generation import generate
from sideroad.data.batches import collate
from sideroad.data.messages import Message, prompt_of
from sideroad.data.template import encode_prompt
from sideroad.kernels.causal_loss import causal_loss
from sideroad.modes import in_eval_mode
from sideroad.train.evaluate_config import EvaluateConfig
from sideroad.train.task_metrics import score, signatures

if TYPE_CHECKING:
    from sideroad.base.loading import Base
    from sideroad.data.config import DataConfig
    from sideroad.data.dataset import DataSet
    from sideroad.data.encode import Encoded
    from sideroad.data.messages import Example

logger = logging.getLogger("sideroad.train.evaluation")

MAX_TOKENS = 2048
"""Tokens run at a time for a loss, padding included."""


@dataclass(frozen=True)
class Sample:
    """One question and what became of it; `prompt` is the conversation as a person reads it."""

    source: str
    prompt: str
    reference: str
    output: str


@dataclass(frozen=True)
class Scores:
    """What a model reached on a data set.

    Attributes:
        loss: mean over trained tokens, in nats; None when there is none.
        tokens: how many trained tokens the loss is a mean of.
        metrics: task metric → value, as `task_metrics.score` gives them.
        answered: how many generated answers the metrics are taken over.
        left_out: examples without an answer to compare with, or too long for the model, among those asked for.
        signatures: sacrebleu's, for the metrics that have one.
    """

    loss: float | None
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    answered: int = 0
    left_out: int = 0
    samples: tuple[Sample, ...] = ()
    signatures: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def values(self) -> dict[str, float]:
        """Loss and metrics in one mapping, the loss first."""
        return {**({} if self.loss is None else {"loss": self.loss}), **self.metrics}

    def to_json(self) -> dict[str, Any]:
        """Return plain values without the samples; a number that JSON does not have is None, beside `finite: false`."""
        plain = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        counts = {"tokens": self.tokens, "answered": self.answered, "left_out": self.left_out}
        extra: dict[str, Any] = {"signatures": dict(self.signatures)} if self.signatures else {}
        finite = {} if None not in plain.values() else {"finite": False}
        return {**plain, **counts, **extra, "seconds": round(self.seconds, 3), **finite}


@dataclass(frozen=True)
class Comparison:
    """The same data set under the base alone and under the adapted model."""

    base: Scores
    adapted: Scores


def evaluate(
    base: Base,
    dataset: DataSet,
    config: EvaluateConfig,
    data_config: DataConfig,
    *,
    packed: bool = False,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    root: Path = Path(),
    known_loss: float | None = None,
    on_answers: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a model on a data set, with whatever adapters act at the moment (see `Attached.using`, `.disabled`).

    Answers are generated only if metrics or samples are wanted.

    Args:
        packed: put several sequences into a row for the loss; isolation must be established and in force.
        max_tokens: tokens run at a time for the loss, padding included; a single longer sequence still runs.
        seed: of the answers, where the temperature is above 0.
        root: where a relative `data_config.chat_template` starts.
        known_loss: the mean loss of these examples under these weights, where it has been taken already; it is then
            reported as it is instead of being computed again.
        on_answers: told while answers are generated how many are there, and of how many.
    """
    started = time.perf_counter()
    if known_loss is None:
        loss, tokens = mean_loss(base, dataset.examples, packed=packed, max_tokens=max_tokens)
    else:
        loss, tokens = known_loss, sum(example.trained_tokens for example in dataset.examples)
    asked, prompts, left_out = _questions(base, dataset.raw, config, data_config, root)
    outputs = _answers(base, prompts, config, seed, on_answers)
    references = [prompt_of(example)[1] for example in asked]
    shown = evenly(range(len(asked)), config.samples)
    samples = tuple(Sample(asked[i].source, readable(prompt_of(asked[i])[0]), references[i], outputs[i]) for i in shown)
    return Scores(
        loss if tokens else None,
        tokens,
        score(config.metrics, outputs, references),
        len(outputs) if config.metrics else 0,
        left_out,
        samples,
        signatures(config.metrics),
        time.perf_counter() - started,
    )


def mean_loss(
    base: Base, examples: Sequence[Encoded], *, packed: bool, max_tokens: int = MAX_TOKENS
) -> tuple[float, int]:
    """Return the mean cross-entropy over all trained tokens, in nats, and their number; (nan, 0) if there is none.

    The model is in eval mode meanwhile and as before afterwards. Args as for `evaluate`.
    """
    total, count = 0.0, 0
    with in_eval_mode(base.model), torch.no_grad():
        for indices in loss_batches([len(example.ids) for example in examples], max_tokens):
            chosen = [examples[index] for index in indices]
            batch = collate(chosen, packed=packed, pad_id=base.tokenizer.pad_token_id)
            mask = None if batch.attention_mask is None else batch.attention_mask.to(base.device)
            inputs = (batch.input_ids.to(base.device), batch.position_ids.to(base.device), mask)
            lengths = batch.lengths if packed else None
            loss, tokens = causal_loss(base.model, *inputs, batch.targets.to(base.device), lengths)
            total, count = total + float(loss), count + tokens
    return (total / count if count else math.nan), count


def loss_batches(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, ...]]:
    """Group examples of similar length so that no group, padded to its longest, passes `max_tokens`.

    A single longer example is a group of its own. The longest come first, so that memory shows at once if it is short.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [tuple(group) for group in groups]


def readable(messages: Sequence[Message]) -> str:
    """Return a prompt for a person: a lone user message as it is, a longer conversation with each speaker named."""
    spoken = [message for message in messages if message.content]
    if len(spoken) == 1 and spoken[0].role == "user":
        return spoken[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in spoken)


def evenly(items: Sequence[Any], count: int | None) -> list[Any]:
    """Pick `count` items spread evenly over a sequence, in order; all of them for None or a larger count."""
    if count is None or count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def _questions(
    base: Base, raw: Sequence[Example], config: EvaluateConfig, data_config: DataConfig, root: Path
) -> tuple[list[Example], list[list[int]], int]:
    wanted = config.limit if config.metrics else min(config.samples, config.limit or config.samples)
    chosen = evenly(raw, wanted)
    room = getattr(base.model.config, "max_position_embeddings", None) or math.inf
    asked, prompts = [], []
    for example in chosen:
        if not example.has_answer:
            continue
        prompt = encode_prompt(prompt_of(example)[0], base.tokenizer, data_config, tools=example.tools, root=root)
        if prompt and len(prompt) + config.max_new_tokens <= room:
            asked.append(example)
            prompts.append(prompt)
    left_out = len(chosen) - len(asked)
    if left_out:
        logger.warning("%d of %d examples have no answer to compare with, or no room for one", left_out, len(chosen))
    return asked, prompts, left_out


def _answers(
    base: Base,
    prompts: list[list[int]],
    config: EvaluateConfig,
    seed: int,
    on_answers: Callable[[int, int], None] | None,
) -> list[str]:
    if not prompts:
        return []
    found = generate(
        base,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=seed,
        batch_size=config.batch_size,
        on_finished=None if on_answers is None else lambda finished: on_answers(finished, len(prompts)),
    )
    return [str(text) for text in base.tokenizer.batch_decode(found, skip_special_tokens=True)]
