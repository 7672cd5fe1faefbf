"""Which files make an adapter directory, and what to say about a path that is something else."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from sideroad.errors import AdapterError, did_you_mean
from sideroad.files import refuse_odd_path, shown_path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
PICKLE = "adapter_model.bin"
MANIFEST = "sideroad.json"
CARD = "README.md"

_CONVERT = """
    import torch
    from safetensors.torch import save_file
    tensors = torch.load("{pickle}", map_location="cpu", weights_only=True)
    save_file({{k: v.contiguous() for k, v in tensors.items()}}, "{target}", metadata={{"format": "pt"}})
Then remove {name} and load again."""


def refuse_elsewhere(directory: Path) -> None:
    """Raise a helpful error unless a path is a directory with an adapter_config.json.

    Raises:
        AdapterError: nothing there (with the nearest neighbour), a file, a model, a directory of adapters, a circle of
            links, no permission.
    """
    refuse_odd_path(directory)
    with _readable(directory):
        _refuse_elsewhere(directory)


def _refuse_elsewhere(directory: Path) -> None:
    if not directory.exists():
        if directory.is_symlink():
            raise AdapterError(
                f"{directory} is a symbolic link that leads to nothing or in a circle. Give the directory itself."
            )
        near = [entry.name for entry in directory.parent.iterdir()] if directory.parent.is_dir() else []
        raise AdapterError(
            f"there is no adapter at {directory}.{did_you_mean(directory.name, near)} Give a local directory with "
            f"{CONFIG} and {WEIGHTS}; an adapter on a hub must be downloaded first (hf download NAME --local-dir DIR)."
        )
    if not directory.is_dir():
        raise AdapterError(f"{directory} is a file; give the directory that holds {CONFIG} and {WEIGHTS}.")
    if (directory / CONFIG).exists() or (directory / CONFIG).is_symlink():
        return
    inner = _adapters_below(directory)
    if inner:
        raise AdapterError(
            f"{directory} is not an adapter itself; it holds {', '.join(inner[:8])}"
            f"{f' and {len(inner) - 8} more' if len(inner) > 8 else ''}. Give one of them: {directory / inner[0]}"
        )
    if (directory / "config.json").exists():
        raise AdapterError(
            f"{directory} is a model directory (config.json), not an adapter. Give it as the base, and here a "
            f"directory with {CONFIG}."
        )
    found = sorted(entry.name for entry in directory.iterdir())[:8]
    raise AdapterError(
        f"{directory} has no {CONFIG}, so it is not an adapter. It holds: {', '.join(found) or 'nothing'}."
        f"{did_you_mean(CONFIG, found)}"
    )


def find_weights(directory: Path) -> Path:
    """Return the safetensors file or the index of its shards.

    Raises:
        AdapterError: neither or both are there; for a pickle, the lines that convert it; no permission.
    """
    with _readable(directory):
        return _find_weights(directory)


def _find_weights(directory: Path) -> Path:
    single, index = directory / WEIGHTS, directory / INDEX
    there = [path for path in (single, index) if path.exists() or path.is_symlink()]
    if len(there) == 1:
        return there[0]
    if there:
        raise AdapterError(f"{directory} holds both {WEIGHTS} and {INDEX}; remove the one that is out of date.")
    pickle = directory / PICKLE
    if pickle.exists():
        raise AdapterError(
            f"{pickle} is a pickle, which can run code when it is opened; it is not read. Convert it once:"
            + _CONVERT.format(pickle=pickle, target=single, name=PICKLE)
        )
    found = sorted(entry.name for entry in directory.iterdir() if entry.suffix in (".safetensors", ".bin", ".gguf"))
    raise AdapterError(
        f"{directory} has {CONFIG} but no {WEIGHTS}.{did_you_mean(WEIGHTS, found)} "
        f"Weight files there: {', '.join(found) or 'none'}."
    )


def directory_name(name: str) -> str:
    """Return the name of a directory for an adapter's name, for saving several adapters beside each other.

    Letters a to z, digits, `-`, `_` and inner dots stay; everything else is percent-escaped, and a name too long for a
    file system ends in a hash. No name leads elsewhere or hides, and two names have two directories (on a disk that
    ignores case, names that differ only in case do not).
    """
    escaped = quote(name, safe="", errors="surrogatepass").replace("~", "%7E")
    escaped = f"%2E{escaped[1:]}" if escaped.startswith(".") else escaped
    if len(escaped) <= 200:
        return escaped
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{escaped[:150]}%-{digest}"  # no escape looks like %-


def must_not_replace(directory: Path) -> str | None:
    """Say why a directory is not to be replaced by an adapter: it holds something that is not an adapter's."""
    names = [entry.name for entry in directory.iterdir()]
    others = sorted(name for name in names if not _belongs(name) or (directory / name).is_dir())
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        return f"it holds {', '.join(others[:5])}{more}, which no adapter has."
    return None if CONFIG in names else f"it is not empty and has no {CONFIG}."


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        what = problem.strerror or problem
        raise AdapterError(
            f"{shown_path(directory)} cannot be read: {what}. Check the path and its permissions."
        ) from problem


def _belongs(name: str) -> bool:
    shard = name.startswith("adapter_model-") and name.endswith(".safetensors")
    return shard or name in (CONFIG, WEIGHTS, INDEX, PICKLE, MANIFEST, CARD)


def _adapters_below(directory: Path) -> list[str]:
    return sorted(
        entry.relative_to(directory).parent.as_posix()
        for pattern in (f"*/{CONFIG}", f"*/*/{CONFIG}")
        for entry in directory.glob(pattern)
    )
