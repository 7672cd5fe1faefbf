"""Which number type a base is held in: by device, and on a CPU by measuring."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

logger = logging.getLogger("sideroad.base.dtype_probe")

CLEARLY_FASTER = 1.25
"""bfloat16 halves memory but rounds to 8 bits; on a CPU it must pay at least this much to be chosen."""

_ROWS, _INNER, _COLUMNS = 512, 576, 1536
_ROUNDS = 7
_BUDGET_SECONDS = 0.4


@dataclass(frozen=True)
class DtypeChoice:
    """A chosen type and why; hand `dtype` to `load_base` to replay it.

    Attributes:
        reason: one line for people.
        seconds: per product, by type name; empty where nothing was measured.
    """

    dtype: torch.dtype
    reason: str
    seconds: dict[str, float]


def choose_dtype(device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> DtypeChoice:
    """Choose the storage and compute type for a device when the recipe says `auto`.

    A CPU is measured. A CUDA device gets bfloat16 where it computes in it, else float32: float16 overflows in training
    without loss scaling, which sideroad does not do. MPS gets float32 for the same reason. The last two are judged,
    not measured, and the reason says so.
    """
    if device.type == "cpu":
        return probe_cpu(clock=clock)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DtypeChoice(torch.bfloat16, "bfloat16: the GPU computes in it (not measured)", {})
        return DtypeChoice(
            torch.float32, "float32: the GPU has no bfloat16, and float16 is not safe in training (not measured)", {}
        )
    return DtypeChoice(torch.float32, f"float32: the safe choice on {device.type} (not measured)", {})


def probe_cpu(*, clock: Callable[[], float] = time.perf_counter) -> DtypeChoice:
    """Time one matrix product ([512, 576] by [576, 1536]) in float32 and bfloat16, in turn, and compare medians.

    Takes at most about half a second; on a slow machine fewer rounds are made.
    """
    operands = {dtype: _operands(dtype) for dtype in (torch.float32, torch.bfloat16)}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    with torch.no_grad():
        start = clock()
        for turn in range(_ROUNDS + 1):
            for dtype, (left, right) in operands.items():
                before = clock()
                torch.matmul(left, right)
                elapsed = clock() - before
                # The first product of a type pays for the library's warm-up.
                if turn > 0:
                    times[dtype].append(elapsed)
            if turn > 0 and clock() - start > _BUDGET_SECONDS:
                break
    single, half = median(times[torch.float32]), median(times[torch.bfloat16])
    ratio = single / half if half > 0 else 1.0
    chosen = torch.bfloat16 if ratio >= CLEARLY_FASTER else torch.float32
    name = str(chosen).removeprefix("torch.")
    reason = (
        f"{name}: a probe product took {single * 1e3:.2f} ms in float32 and {half * 1e3:.2f} ms in bfloat16 "
        f"({ratio:.2f}x; bfloat16 is taken from {CLEARLY_FASTER}x)"
    )
    logger.info("dtype %s", reason)
    return DtypeChoice(chosen, reason, {"float32": single, "bfloat16": half})


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(_ROWS, _INNER, generator=generator)
    right = torch.randn(_INNER, _COLUMNS, generator=generator)
    return left.to(dtype), right.to(dtype)
