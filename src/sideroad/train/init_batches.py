"""The batches of training data that an initialisation looks at."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from sideroad.config import EvaInit, LoraGaInit
from sideroad.data.encode import Encoded

IGNORED = -100
"""Label of a token that is not trained on, as transformers' models know it."""


def init_batches(
    init: object, examples: Sequence[Encoded], *, size: int, pad_id: int, seed: int, device: torch.device
) -> list[dict[str, Tensor]] | None:
    """Return as many padded batches, drawn at random, as an initialisation looks at; None for one that needs no data.

    Args:
        size: examples in a batch.
    """
    if not isinstance(init, EvaInit | LoraGaInit):
        return None
    count = min(len(examples), init.batches * size)
    drawn = [examples[index] for index in random.Random(seed).sample(range(len(examples)), count)]
    return [_padded(drawn[start : start + size], pad_id, device) for start in range(0, count, size)]


def _padded(examples: Sequence[Encoded], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    width = max(len(one) for one in examples)
    shape = len(examples), width
    ids, labels, mask = torch.full(shape, pad_id), torch.full(shape, IGNORED), torch.zeros(shape, dtype=torch.long)
    for row, one in enumerate(examples):
        tokens = torch.tensor(one.ids)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = tokens.masked_fill(~torch.tensor(one.trained, dtype=torch.bool), IGNORED)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}
