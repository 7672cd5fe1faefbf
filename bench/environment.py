"""The environment that `bench/train.py` runs in: the peers' versions, and the machine that its numbers belong to.

All sides run in one process, so they share torch and transformers. Where the running environment lacks the peers'
versions named in `constraints.txt`, a virtual environment is made once, in `$SIDEROAD_BENCH_ENV` or the user's cache:
it sees everything that the running one has and adds what is missing; then the command starts again in it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from sideroad import __version__

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("peft", "trl")
VERSIONS = ("torch", "transformers", *PEERS)
_PLACE, _INSIDE = "SIDEROAD_BENCH_ENV", "SIDEROAD_BENCH_INSIDE"


def wanted() -> dict[str, str]:
    """Return the peers' versions that the repository is measured with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {name: pinned[name] for name in PEERS}


def present(name: str) -> str | None:
    """Return the installed version of a package; None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def enter() -> None:
    """Go on in an environment that has the peers, making it first where needed; prints which one it is."""
    lacking = [f"{name}=={version}" for name, version in wanted().items() if present(name) != version]
    shown = ", ".join(f"{name} {present(name)}" for name in VERSIONS)
    if not lacking:
        place = os.environ.get(_INSIDE)
        print(f"{shown}: from {'the environment made for the peers' if place else 'the running environment'}")
        return
    if os.environ.get(_INSIDE):
        sys.exit(f"the environment made for the peers still lacks {', '.join(lacking)} (it has {shown})")
    python = _make(lacking)
    os.execve(python, [str(python), *sys.argv], {**os.environ, _INSIDE: "1"})


def machine(threads: int, base: str, dtype: str, *, compiled: bool) -> dict[str, Any]:
    """Return the versions, the machine and the settings that the numbers belong to."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "sideroad": __version__,
        **{name: present(name) for name in VERSIONS},
        "python": platform.python_version(),
        "cpu": models[0] if models else platform.processor(),
        "threads": threads,
        "base": base,
        "dtype": dtype,
        "compile": "on" if compiled else "off",
    }


def _make(lacking: list[str]) -> Path:
    """Make the peers' environment, or add to it, and return its Python."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sideroad" / "bench-peers"
    place = Path(os.environ.get(_PLACE) or default)
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    print(f"the running environment lacks {', '.join(lacking)}; installing into {place}", flush=True)
    if not python.exists():
        venv.create(place, with_pip=True)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    packages = Path(found.stdout.strip())
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "running.pth").write_text("\n".join([*seen, str(ROOT / "src")]) + "\n", encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *lacking], check=False)
    if done.returncode:
        sys.exit(f"installing {', '.join(lacking)} failed; see above")
    return python
