"""Rotary self-attention over a packed row without copies between its parts: tokens stay the first dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sideroad.kernels.live import foreign_hook
from sideroad.kernels.packed_attention import attend_segments, segment_arguments
from sideroad.kernels.pieces import EAGER, Pieces
from sideroad.kernels.rotary import rotary
from sideroad.segments import Segments, apart, longest

_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = frozenset({"q_norm", "k_norm"})
_LENGTHS = (4, 3)
_SEED = 20261125


class FastAttention:
    """The forward of an attention that projects, perhaps normalises each head, rotates, attends and projects back.

    It is taken for packed rows; everything else (padding, a cache) goes to the module's own forward.
    """

    def __init__(self, module: nn.Module, pieces: Pieces) -> None:
        self.module = module
        self.pieces = pieces

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return (output, None), or whatever the module itself returns."""
        segments = kwargs.get("segments")
        angles = kwargs.get("position_embeddings")
        x = args[0] if len(args) == 1 else kwargs.get("hidden_states") if not args else None
        other = any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values"))
        if x is None or angles is None or segments is None or other or not self._sees_all(segments):
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.attend(x, angles, segments), None

    def attend(self, x: Tensor, angles: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """Return the output for one packed row.

        Args:
            x: [1, row, width].
            angles: cos and sin, [1, row, width of a head].
        """
        module, dim = self.module, self.module.head_dim
        q, k, v = (getattr(module, name)(x)[0].unflatten(-1, (-1, dim)) for name in _LAYERS[:3])
        if "q_norm" in module._modules:
            q, k = module.q_norm(q), module.k_norm(k)  # type: ignore[operator]
        cos, sin = (one[0][:, None] for one in angles)
        q, k = rotary(q, cos, sin, self.pieces), rotary(k, cos, sin, self.pieces)
        query, key, value = (one.transpose(0, 1)[None] for one in (q, k, v))
        dropout = float(getattr(module, "attention_dropout", 0.0)) if module.training else 0.0
        scale: float = module.scaling  # type: ignore[assignment]
        out = attend_segments(query, key, value, segments, scale=scale, dropout=dropout)
        projected: Tensor = module.o_proj(out.flatten(2))  # type: ignore[operator]
        return projected

    def _sees_all(self, segments: Segments) -> bool:
        reach = getattr(self.module, "sliding_window", None)
        return reach is None or longest(segments) <= reach


@torch.no_grad()
def match_attention(module: nn.Module) -> bool:
    """Tell whether a module's results are those of `FastAttention`; segmented attention must be in force."""
    children = {name for name, child in module._modules.items() if child is not None}
    named = set(_LAYERS) <= children <= {*_LAYERS, *_NORMS} and (children & _NORMS) in (set(), set(_NORMS))
    if not named or module._parameters or foreign_hook(module):
        return False
    dim, scaling = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    layer = module.get_submodule("q_proj")
    if not isinstance(dim, int) or not isinstance(scaling, float) or not isinstance(layer, nn.Linear):
        return False
    weight, row = layer.weight, sum(_LENGTHS)
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(1, row, layer.in_features, generator=generator).to(weight.device, weight.dtype)
    turns = torch.randn(1, row, dim // 2, generator=generator).repeat(1, 1, 2).to(weight.device)
    angles = turns.cos().to(weight.dtype), turns.sin().to(weight.dtype)
    segments = apart(_LENGTHS)
    try:
        with segment_arguments(segments) as extra:
            expected = module(hidden_states=x, position_embeddings=angles, attention_mask=None, **extra)[0]
        found = FastAttention(module, EAGER).attend(x, angles, segments)
    except Exception:  # a module that does not take these arguments is not the one looked for
        return False
    # the same operations in the same order but for the sum of two products, which 16-bit types round once less
    tolerance = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    scale = expected.float().abs().max().clamp_min(1e-20)
    return found.shape == expected.shape and bool((found.float() - expected.float()).abs().max() <= tolerance * scale)
