"""The output head of a causal model: found, asked what follows it, and left out of the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sideroad.kernels.head_loss import Finish
from sideroad.kernels.live import projection_of, refusal
from sideroad.kernels.products import Projection
from sideroad.kernels.standing_in import standing_in
from sideroad.modes import in_eval_mode

_CAPS = ("final_logit_softcapping", "final_logit_soft_cap", "logits_soft_cap")
_SENTINELS = (-40.0, -7.0, -1.0, -0.25, 0.0, 0.5, 3.0, 25.0)


@dataclass(frozen=True)
class Head:
    """A linear output head after which a model only scales or soft-caps its logits."""

    layer: nn.Module
    finish: Finish

    def projection(self) -> Projection | None:
        """Return the head and its live pair; None where it must compute itself now."""
        found = projection_of(self.layer)
        if isinstance(found, str) or (found.pair is not None and found.pair.dropout):
            return None
        return found

    def hidden(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """Run the model up to its head, and return what enters that, [rows, length, width]."""
        with _answering(self.layer, _one_zero) as seen:
            model(**arguments)
        (found,) = seen
        return found


@torch.no_grad()
def find_head(model: nn.Module, arguments: Mapping[str, Any]) -> Head | str:
    """Return a model's head, or say why its loss must be taken from its own logits.

    Args:
        arguments: of a short forward pass.
    """
    ask = getattr(model, "get_output_embeddings", None)
    layer = ask() if ask is not None else None
    name = type(model).__name__
    if not isinstance(layer, nn.Linear):
        return f"{name} names no linear output head"
    if reason := refusal(layer):
        return f"the output head {reason}"
    if isinstance(found := projection_of(layer), str):
        return f"the output head {found}"
    if found.pair is not None and found.pair.dropout:
        return "the output head's adapter has dropout"
    with in_eval_mode(model):
        try:
            with _answering(layer, _sentinels) as seen:
                given = model(**arguments).logits
        except Exception as error:  # whatever a foreign model does with its logits, it is not scaling or capping alone
            return f"{name} cannot be asked for the input of its head: {type(error).__name__}"
    if len(seen) != 1:
        return f"{name} calls its head {len(seen)} times"
    finish = _fit(given, model)
    return f"{name} does something unknown to its logits" if finish is None else Head(layer, finish)


def _fit(given: Tensor, model: nn.Module) -> Finish | None:
    """The finish that turns the sentinels into what the model gave."""
    if given.shape[-1] != len(_SENTINELS):
        return None
    z = torch.tensor(_SENTINELS, dtype=torch.float64)
    rows = given.reshape(-1, len(_SENTINELS)).double().cpu()
    found = rows[0]
    if not (rows == found).all():
        return None
    exact = given.dtype in (torch.float32, torch.float64)
    config = getattr(model, "config", None)
    caps: Sequence[float | None] = (None, *(cap for name in _CAPS if (cap := getattr(config, name, None))))
    for cap in caps:
        inner = found if cap is None else cap * torch.atanh((found / cap).clamp(-1 + 1e-12, 1 - 1e-12))
        small = slice(2, 7)  # where tanh is not flat
        scale = float((inner[small] * z[small]).sum() / z[small].square().sum())
        # configured scales are short numbers; the fit of rounded logits is not
        for guess in (float(f"{scale:.6g}"), scale):
            again = guess * z if cap is None else cap * torch.tanh(guess * z / cap)
            if torch.allclose(found, again, rtol=1e-5 if exact else 1e-2, atol=1e-5):
                return Finish(guess, cap)
    return None


@contextmanager
def _answering(layer: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Collect the inputs of a layer, which answers with a few numbers for each row instead of computing."""

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return answer(x)

    seen: list[Tensor] = []
    with standing_in([(layer, forward)], with_deltas=True):
        yield seen


def _one_zero(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], 1)


def _sentinels(x: Tensor) -> Tensor:
    return x.new_tensor(_SENTINELS).expand(*x.shape[:-1], len(_SENTINELS)).clone()
