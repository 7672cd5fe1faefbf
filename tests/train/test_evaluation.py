"""Loss and answers of a model on a data set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_rows, tiny_llama, tiny_tokenizer
from torch.nn.functional import cross_entropy

from sideroad.base.identity import BaseIdentity
from sideroad.base.loading import Base
from sideroad.data.config import DataConfig
from sideroad.data.dataset import DataSet, load_data
from sideroad.data.messages import Message
from sideroad.kernels.isolation import choose_route, packing
from sideroad.train import evaluation
from sideroad.train.evaluate_config import EvaluateConfig
from sideroad.train.evaluation import Scores, evaluate, evenly, loss_batches, mean_loss, readable


@pytest.fixture(scope="module")
def base() -> Base:
    identity = BaseIdentity("tiny", "tiny", "0" * 64, None, 1)
    return Base(tiny_llama(), tiny_tokenizer(), identity, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def data_config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in chat_rows(7)))
    return DataConfig(train=str(path), max_length=256)


@pytest.fixture(scope="module")
def dataset(base: Base, data_config: DataConfig) -> DataSet:
    return load_data(data_config, base.tokenizer, root=Path()).train


def expected_loss(base: Base, dataset: DataSet) -> tuple[float, int]:
    total, count = 0.0, 0
    for item in dataset.examples:
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([item.ids])).logits[0, :-1].double()
        targets = torch.tensor([t if kept else -100 for t, kept in zip(item.ids, item.trained, strict=True)][1:])
        total += cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        count += sum(item.trained)
    return total / count, count


@pytest.mark.parametrize("max_tokens", [1, 300, 100_000])
@pytest.mark.parametrize("packed", [False, True])
def test_mean_loss_is_that_of_each_example_alone(base: Base, dataset: DataSet, max_tokens: int, packed: bool) -> None:
    expected, count = expected_loss(base, dataset)
    with packing(base.model, choose_route(base.model)):
        loss, tokens = mean_loss(base, dataset.examples, packed=packed, max_tokens=max_tokens)
    assert tokens == count
    assert loss == pytest.approx(expected, rel=1e-6)


def test_mode_is_kept(base: Base, dataset: DataSet) -> None:
    base.model.train()
    base.model.model.layers[0].eval()
    before = [module.training for module in base.model.modules()]
    mean_loss(base, dataset.examples, packed=False)
    assert [module.training for module in base.model.modules()] == before
    base.model.eval()


def test_answers_are_scored_against_references(
    base: Base, dataset: DataSet, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    references = [example.messages[-1].content for example in dataset.raw]

    def answer(_base: Base, prompts: list[list[int]], **arguments: Any) -> list[list[int]]:
        calls.append({"prompts": prompts, **arguments})
        texts = [*references[:3], *["{}"] * (len(references) - 3)]
        return [base.tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    monkeypatch.setattr(evaluation, "generate", answer)
    config = EvaluateConfig(metrics=("exact_match", "json_valid", "bleu"), samples=2, max_new_tokens=9, batch_size=3)
    scores = evaluate(base, dataset, config, data_config)
    assert scores.metrics["exact_match"] == pytest.approx(3 / 7)
    assert scores.metrics["json_valid"] == 1
    assert list(scores.signatures) == ["bleu"]
    assert (scores.answered, scores.left_out, len(scores.samples)) == (7, 0, 2)
    assert scores.samples[0].reference == scores.samples[0].output == references[0]
    assert scores.samples[0].source == dataset.raw[0].source
    assert calls[0]["max_new_tokens"] == 9
    assert calls[0]["batch_size"] == 3
    prompt = base.tokenizer.decode(calls[0]["prompts"][0])
    assert prompt.endswith("<|im_start|>assistant\n")
    assert references[0] not in prompt


def test_real_generation_gives_an_answer_to_every_sample(
    base: Base, dataset: DataSet, data_config: DataConfig
) -> None:
    scores = evaluate(base, dataset, EvaluateConfig(samples=3, max_new_tokens=4), data_config)
    assert len(scores.samples) == 3
    assert (scores.metrics, scores.answered) == ({}, 0)
    assert scores.seconds > 0


def test_neither_metrics_nor_samples_generate_nothing(
    base: Base, dataset: DataSet, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "generate", None)
    scores = evaluate(base, dataset, EvaluateConfig(samples=0), data_config)
    assert scores.samples == ()
    assert scores.loss is not None


def test_limit_bounds_the_answers_but_not_the_loss(base: Base, dataset: DataSet, data_config: DataConfig) -> None:
    config = EvaluateConfig(metrics=("exact_match",), limit=2, samples=5, max_new_tokens=2)
    scores = evaluate(base, dataset, config, data_config)
    assert (scores.answered, len(scores.samples)) == (2, 2)
    assert scores.tokens == sum(sum(item.trained) for item in dataset.examples)


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(
    base: Base, dataset: DataSet, data_config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = EvaluateConfig(metrics=("exact_match",), max_new_tokens=511)
    scores = evaluate(base, dataset, config, data_config)
    assert (scores.answered, scores.left_out, scores.metrics) == (0, 7, {})
    assert "7 of 7 examples have no answer to compare with, or no room for one" in caplog.text


def test_scores_in_json_hold_no_nan() -> None:
    written = Scores(math.nan, 3, {"bleu": 1.0}).to_json()
    assert written["loss"] is None
    assert written["finite"] is False
    json.dumps(written, allow_nan=False)
    assert "finite" not in Scores(1.0, 3).to_json()


def test_loss_batches_keep_to_the_limit_and_lose_nothing() -> None:
    lengths = [3, 50, 7, 9, 120, 1, 8]
    batches = loss_batches(lengths, 30)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 30 for batch in batches)
    assert batches[0] == (4,)
    assert loss_batches([], 30) == []


def test_evenly_spreads_over_the_set() -> None:
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(3), 5) == [0, 1, 2]
    assert evenly(range(3), None) == [0, 1, 2]
    assert evenly(range(3), 0) == []


def test_a_lone_question_reads_as_it_is_and_a_conversation_names_its_speakers() -> None:
    assert readable([Message("user", "Hi")]) == "Hi"
    assert readable([Message("system", "Be brief."), Message("user", "Hi")]) == "system: Be brief.\nuser: Hi"
