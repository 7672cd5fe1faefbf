"""The machine and the software a run was made with, and what that changes for a resume."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import sideroad
from sideroad.train.seeds import derive


def describe(
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    packing: Mapping[str, str],
    execution: Mapping[str, Any],
    base: Mapping[str, Any],
) -> dict[str, Any]:
    """What env.json records: versions, machine, threads, what was decided by a probe, and the derived seeds.

    Args:
        packing: `route` and `reason` of the packing probe.
        execution: what was decided about the fast path.
        base: identity of the base model.
    """
    return {
        "sideroad": sideroad.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "packing": dict(packing),
        "execution": dict(execution),
        "base": dict(base),
        "seeds": {part: derive(seed, part) for part in ("init", "data", "dropout")},
    }


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Entries that differ, one sentence each; with any of them a resume need not be equal bit for bit."""
    before, after = _flat(recorded), _flat(now)
    return [
        f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        # a section that an older version did not write has no earlier value
        if before.get(key) != after.get(key) and key.partition(".")[0] in recorded
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: torch's allocations on CUDA, the driver's on MPS, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
