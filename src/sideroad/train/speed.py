"""How fast a run was, and how near to what the machine's matrix products allow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sideroad.kinds import kind_of
from sideroad.kinds.experts import expert_weights
from sideroad.route import walk

_ROWS = 512
_ROUNDS = 5
_LARGEST_BYTES = 2**27


@dataclass(frozen=True)
class Work:
    """Parameters whose products a training step takes.

    Attributes:
        body: parameters of the frozen linear layers from the first adapted block up to the head: each takes 4
            operations a token, forward and towards the input.
        below: those of the blocks below, which take 2 operations; 0 where they are computed once and kept.
        head: those of the output head, 4 operations for each place that predicts.
        adapter: trained ones: 6 operations a token.
    """

    body: int
    below: int
    head: int
    adapter: int

    def operations(self, tokens: int, predicted: int) -> float:
        """Floating-point operations of a step in products with weights; attention and elementwise work not counted."""
        return (4.0 * self.body + 2.0 * self.below + 6.0 * self.adapter) * tokens + 4.0 * self.head * predicted


@dataclass(frozen=True)
class Speed:
    """Rates over all steps of a run, validations not counted.

    Attributes:
        trained_tokens_per_second: tokens that the loss counts.
        real_tokens_per_second: tokens of the sequences, whether or not a shared beginning was computed once.
        saved_tokens: real tokens that were not computed, because another sequence of the batch shares them.
        limit_share: of the time, what the products with the weights would take at the machine's measured rate.
    """

    trained_tokens_per_second: float
    real_tokens_per_second: float
    saved_tokens: int
    limit_share: float | None


def work_of(model: nn.Module, trained: int, below: Sequence[nn.Module] = (), *, kept: bool = False) -> Work:
    """Count the parameters of a model's products; of a mixture of experts, those of all of them.

    Args:
        trained: parameters of the adapter.
        below: blocks without a gradient.
        kept: what these give is computed once and kept.
    """
    lower = {module for block in below for module in block.modules()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    counts = {"body": 0, "below": 0}
    for _, module in walk(model):
        kind = kind_of(module) if module is not head else None
        if kind is not None and kind.linear:
            counts["below" if module in lower else "body"] += module.get_parameter("weight").numel()
        for name in expert_weights(module):
            counts["below" if module in lower else "body"] += module.get_parameter(name).numel()
    in_head = head.weight.numel() if head is not None else 0
    return Work(counts["body"], 0 if kept else counts["below"], in_head, trained)


def measure_limit(device: torch.device, dtype: torch.dtype, model: nn.Module) -> float:
    """Return the operations a second that matrix products of the model's most common shape reach, with 512 rows.

    Takes a few hundredths of a second on a CPU; the best of five rounds counts.
    """
    shapes = [m.weight.shape for _, m in walk(model) if isinstance(m, nn.Linear) and m.weight.device.type != "meta"]
    fitting = [one for one in shapes if one.numel() * dtype.itemsize <= _LARGEST_BYTES] or [torch.Size((512, 512))]
    out, inner = max(set(fitting), key=lambda shape: (fitting.count(shape) * shape.numel(), shape))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        left = torch.randn(_ROWS, inner).to(device, dtype)
        right = torch.randn(out, inner).to(device, dtype)
        times = []
        for _ in range(_ROUNDS + 1):
            _wait(device)
            started = time.perf_counter()
            torch.mm(left, right.t())
            _wait(device)
            times.append(time.perf_counter() - started)
    return 2.0 * _ROWS * out * inner / min(times[1:])


def speed_of(records: Iterable[Mapping[str, Any]], work: Work, limit: float) -> Speed | None:
    """Sum up the steps of metrics.jsonl; None if there is none.

    Args:
        limit: operations a second, see `measure_limit`.
    """
    steps = [record for record in records if "real_tokens" in record]
    seconds = sum(step["seconds"] for step in steps)
    if not steps or seconds <= 0:
        return None
    trained, real, computed = (sum(one[f"{kind}_tokens"] for one in steps) for kind in ("trained", "real", "computed"))
    least = work.operations(computed, trained) / limit
    return Speed(trained / seconds, real / seconds, max(0, real - computed), least / seconds)


def expected_seconds(work: Work, limit: float, tokens: int, trained: int) -> float:
    """Roughly how long a run will take: its products at the machine's rate, and half as much for everything else."""
    return 1.5 * work.operations(tokens, trained) / limit


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
