"""Random state without history: every seed follows from the recipe's and from where it is used."""

from __future__ import annotations

import hashlib


def derive(seed: int, *place: str | int) -> int:
    """A seed in [0, 2^63) for one use, such as `derive(0, "dropout")`; other places are independent.

    Args:
        seed: the recipe's.
        place: component and position; equal places give equal seeds on every machine.
    """
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
