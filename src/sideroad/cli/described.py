"""A method and its ranks in words, as headers and reports show them: what is the default is not said."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sideroad.analyze.inspect import RankReport
    from sideroad.config import Init, Method


def method_line(method: Method) -> str:
    """Return `dora, rank 8, alpha 16, scaling alpha/sqrt(r), init pissa`; trains, dropout likewise where set."""
    rank = f"rank {method.rank}"
    if method.kind == "adalora":
        rank += f" down to {method.target_rank} on average"
    told = [method.kind, rank, f"alpha {method.alpha:g}"]
    told += [f"dropout {method.dropout:g}"] if method.dropout else []
    for name in ("scaling", "init", "trains"):
        value = getattr(method, name, None)
        if value is not None and value != type(method).model_fields[name].default:
            told.append(f"{name} {_init(value) if name == 'init' else value}")
    return ", ".join(told)


def ranks_line(ranks: RankReport) -> str:
    """Return `2 to 16, sum 112 over 14 layers; 3 more have none`."""
    more = f"; {ranks.without} more have none" if ranks.without else ""
    return f"{ranks.smallest} to {ranks.largest}, sum {ranks.total} over {ranks.layers} layers{more}"


def _init(init: Init) -> str:
    if isinstance(init, str):
        return init
    fields = type(init).model_fields
    numbers = {name: getattr(init, name) for name in fields if name != "kind"}
    changed = [f"{name} {value:g}" for name, value in numbers.items() if value != fields[name].default]
    return f"{init.kind} ({', '.join(changed)})" if changed else init.kind
