"""Which layers are adapted where nobody says: a table of layer names instead of one of architectures."""

from __future__ import annotations

from collections.abc import Iterable

_RWKV7 = ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value")

FAMILIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("q_proj", "v_proj", "self_attn.dense", "fc1", "fc2"), ("q_proj", "v_proj", "fc1", "fc2")),
    (("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "conv1d"), ("q_proj", "k_proj", "v_proj", "o_proj")),
    (_RWKV7, _RWKV7),
    (("receptance", "key", "value", "output"), ("key", "value", "receptance", "output")),
    (("q_proj", "v_proj"), ("q_proj", "v_proj")),
    (("query_key_value",), ("query_key_value",)),
    (("qkv_proj",), ("qkv_proj",)),
    (("Wqkv",), ("Wqkv",)),
    (("c_attn",), ("c_attn",)),
    (("query_proj", "value_proj"), ("query_proj", "value_proj")),
    (("q", "v"), ("q", "v")),
    (("q_lin", "v_lin"), ("q_lin", "v_lin")),
    (("query", "value"), ("query", "value")),
    (("self.in_proj",), ("in_proj",)),
)
"""Ends of paths that a model has → last names of the layers to adapt; the first row whose ends are all there counts.

Attention's queries and values as in the paper (arXiv:2106.09685, sec. 7.1), the fused projection where there is
one, and the choices PEFT makes for the same models.
"""


def default_names(paths: Iterable[str]) -> tuple[str, ...] | None:
    """Return the last names of the layers to adapt, or None where no row of the table fits.

    Args:
        paths: of all modules of the model.
    """
    parts = [path.split(".") for path in paths]
    present = {path[-1] for path in parts} | {".".join(path[-2:]) for path in parts}
    return next((chosen for needed, chosen in FAMILIES if set(needed) <= present), None)
