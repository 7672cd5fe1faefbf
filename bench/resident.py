"""The memory that this process has resident, and the most it had since a moment of choice."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def restart_peak() -> int:
    """Set the process's peak back to what it holds now, where the system can, and return that in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_bytes()
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Return the most that the process has held, in bytes: since `restart_peak` where the system can, else ever."""
    if Path("/proc/self/status").exists():
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
