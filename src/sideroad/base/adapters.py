"""Where an adapter's files are: a local directory, or a repository on the hub, of which only its files are fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sideroad.adapter_files import CARD, CONFIG, INDEX, MANIFEST, WEIGHTS, refuse_elsewhere
from sideroad.base.fetch import is_offline
from sideroad.errors import AdapterError

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = (CONFIG, WEIGHTS, INDEX, MANIFEST, CARD, "adapter_model-*.safetensors")


def adapter_directory(
    place: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    offline: bool = False,
) -> Path:
    """Return the local directory of an adapter's files.

    What exists as a local path is that; else `owner/name` is a repository of the hub, whose adapter files (never
    pickles) are fetched into the hub's own cache.

    Args:
        subfolder: of the directory or repository.
        revision: branch, tag or commit of the repository; None is the default branch.
        token: for private repositories; None takes the one that is stored.
        offline: use only what is in the cache; SIDEROAD_OFFLINE and HF_HUB_OFFLINE do the same.
    Raises:
        AdapterError: no such directory or repository, or it cannot be reached.
    """
    local = Path(place, *([subfolder] if subfolder else []))
    if Path(place).exists() or not _REPOSITORY.fullmatch(os.fspath(place)):
        if revision is not None:
            raise AdapterError(f"revision is {revision!r}, but {place} is a local directory and has none.")
        refuse_elsewhere(local)
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = f"{subfolder}/" if subfolder else ""
    try:
        found = snapshot_download(
            os.fspath(place),
            revision=revision,
            allow_patterns=[inside + name for name in _FILES],
            token=token,
            local_files_only=is_offline(offline),
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as problem:
        raise AdapterError(
            f"there is no adapter at {place}: it is no local directory, and the hub did not give a repository of that "
            f"name ({type(problem).__name__}: {str(problem).strip().splitlines()[0][:200]}). Check the name, or give a "
            f"directory with {CONFIG} and {WEIGHTS}."
        ) from problem
    directory = Path(found, *([subfolder] if subfolder else []))
    refuse_elsewhere(directory)
    return directory
