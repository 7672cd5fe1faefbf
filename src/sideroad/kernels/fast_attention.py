"""Rotary self-attention over a packed row without copies between its parts: tokens stay the first dimension."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sideroad.kernels.live import foreign_hook
from sideroad.kernels.packed_attention import HARMLESS, IMPLEMENTATION, attend_segments
from sideroad.kernels.pieces import EAGER, Pieces
from sideroad.kernels.rotary import rotary
from sideroad.kernels.structure import MAGNITUDES, eval_deltas, same
from sideroad.modes import cuda_devices, in_eval_mode, in_train_mode
from sideroad.segments import Segments, longest

_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = frozenset({"q_norm", "k_norm"})
_SEED = 20261125


@dataclass(frozen=True)
class Rotary:
    """An attention that projects, perhaps normalises each head, rotates, attends and projects back.

    Attributes:
        dim: of a head.
        scaling: factor on the products of queries and keys.
        dropout: of the attention's weights, in training.
        reach: tokens that it looks back over; None for all.
    """

    dim: int
    scaling: float | None
    dropout: float
    reach: int | None


class FastAttention:
    """The forward of a rotary attention.

    It is taken for packed rows; everything else (padding, a cache) goes to the module's own forward.
    """

    def __init__(self, module: nn.Module, known: Rotary, pieces: Pieces) -> None:
        self.module = module
        self.known = known
        self.pieces = pieces

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return (output, None), or whatever the module itself returns."""
        segments, angles = kwargs.get("segments"), kwargs.get("position_embeddings")
        x = args[0] if len(args) == 1 else kwargs.get("hidden_states") if not args else None
        other = any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values"))
        if x is None or angles is None or segments is None or other or not self._fits(angles, segments):
            return type(self.module).forward(self.module, *args, **kwargs)
        known = self.known
        dropout = known.dropout if self.module.training else 0.0
        q, k, v = self.heads(x, angles)
        out = attend_segments(q, k, v, segments, scale=known.scaling, dropout=dropout)
        return self.module.o_proj(out.flatten(2)), None  # type: ignore[operator]

    def heads(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, [1, heads, row, width of a head].

        Args:
            x: [1, row, width].
            angles: cos and sin, [1, row, width of a head].
        """
        module, dim = self.module, self.known.dim
        q, k, v = (getattr(module, name)(x)[0].unflatten(-1, (-1, dim)) for name in _LAYERS[:3])
        if "q_norm" in module._modules:
            q, k = module.q_norm(q), module.k_norm(k)  # type: ignore[operator]
        cos, sin = (one[0][:, None] for one in angles)
        q, k = rotary(q, cos, sin, self.pieces), rotary(k, cos, sin, self.pieces)
        return q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def _fits(self, angles: tuple[Tensor, Tensor], segments: Segments) -> bool:
        reach = self.known.reach
        return angles[0].shape[-1] == self.known.dim and (reach is None or longest(segments) <= reach)


@dataclass
class _Seen:
    """What an attention hands to the attention function, and what it got back."""

    heads: tuple[Tensor, Tensor, Tensor]
    dropout: float
    scaling: float | None
    others: Mapping[str, Any]
    answer: Tensor


def may_match(module: nn.Module) -> bool:
    """Whether an attention has the layers that `match_attention` knows, and nobody else's hook."""
    children = {name for name, child in module._modules.items() if child is not None}
    named = set(_LAYERS) <= children <= {*_LAYERS, *_NORMS} and (children & _NORMS) in (set(), set(_NORMS))
    return named and not module._parameters and foreign_hook(module) is None


@torch.no_grad()
def match_attention(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rotary | None:
    """Return what is needed to compute an attention if that is what the module does; None otherwise.

    The module is called as the model called it, with larger and smaller inputs, in eval and in training mode; what it
    hands to the attention function, and what it makes of that one's answer, must be what `FastAttention` does.

    Args:
        args, kwargs: of a call in a packed forward pass.
    """
    x = args[0] if len(args) == 1 else kwargs.get("hidden_states")
    angles, dim = kwargs.get("position_embeddings"), getattr(module, "head_dim", None)
    if not isinstance(x, Tensor) or not isinstance(dim, int) or not isinstance(angles, tuple):
        return None
    try:
        found = [_ask(module, x * size, kwargs, mode) for size in MAGNITUDES for mode in (in_eval_mode, in_train_mode)]
    except Exception:  # a module that cannot be asked is not the one looked for
        return None
    seen = [one for one, _ in found]
    known = Rotary(dim, seen[0].scaling, seen[1].dropout, seen[0].others.get("sliding_window"))
    if any(_strange(one, known, training=bool(number % 2)) for number, one in enumerate(seen)):
        return None
    fast = FastAttention(module, known, EAGER)
    with in_eval_mode(module):
        for number, (one, output) in enumerate(found):
            try:
                heads = fast.heads(x * MAGNITUDES[number // 2], angles)
            except RuntimeError:  # angles narrower than a head, heads of another width
                return None
            projected = module.o_proj(one.answer.flatten(2))  # type: ignore[operator]
            pairs = [*zip(heads, one.heads, strict=True), (projected, output)]
            if not all(_alike(ours, theirs) for ours, theirs in pairs):
                return None
    return known


def _ask(module: nn.Module, x: Tensor, kwargs: Mapping[str, Any], mode: Any) -> tuple[_Seen, Tensor]:
    """Call a module with an attention function that notes what it is given; the module's output comes second."""
    given = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    with mode(module), eval_deltas(module), torch.random.fork_rng(devices=cuda_devices(module)), _noting() as seen:
        torch.manual_seed(_SEED)
        output = module(hidden_states=x, **given)
    (one,) = seen
    return one, output[0]


def _strange(seen: _Seen, known: Rotary, *, training: bool) -> bool:
    """Whether an attention asks the attention function for something that the stand-in would not."""
    unknown = {name for name, value in seen.others.items() if value is not None} - HARMLESS - {"segments"}
    same_dropout = seen.dropout == (known.dropout if training else 0.0)
    causal = seen.others.get("is_causal", True) is not False
    return bool(unknown) or not same_dropout or not causal or seen.scaling != known.scaling


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.dtype in (torch.float32, torch.float64):
        return same(found, expected)
    # the rotation sums two products, which the module rounds once more than we do
    scale = expected.float().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return found.shape == expected.shape and bool(((found.float() - expected.float()).abs() <= 2e-2 * scale).all())


@contextmanager
def _noting() -> Iterator[list[_Seen]]:
    """Let attention answer with random numbers, and note what it was given."""
    seen: list[_Seen] = []
    before = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]

    def attend(_module: nn.Module, *given: Any, **others: Any) -> tuple[Tensor, None]:
        query, key, value, mask = given
        dropout, scaling = others.pop("dropout", 0.0), others.pop("scaling", None)
        generator = torch.Generator().manual_seed(_SEED)
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        answer = torch.randn(shape, generator=generator).to(query.device, query.dtype)
        others["attention_mask"] = mask
        seen.append(_Seen((query, key, value), dropout, scaling, others, answer))
        return answer, None

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend)
    try:
        yield seen
    finally:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, before)
