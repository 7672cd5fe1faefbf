"""Whether a model can keep the sequences of a packed row apart, found out on the live model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sideroad.kernels.causal_loss import forward_logits
from sideroad.kernels.packed_attention import refusal, segment_attention
from sideroad.modes import cuda_devices, in_eval_mode
from sideroad.segments import Segment, apart

_LENGTHS = (7, 9, 8)
_MIDDLE = slice(_LENGTHS[0], _LENGTHS[0] + _LENGTHS[1])
_SEED = 20240509


@dataclass(frozen=True)
class PackingRoute:
    """How packed rows are computed on a model.

    `segments`: one attention call per sequence. `mask`: transformers' own attention with a block mask, right for any
    model that honours position ids, but the hidden products are computed. `none`: sequences would see each other.
    """

    kind: Literal["segments", "mask", "none"]
    reason: str
    """Why a faster route was not taken; empty for `segments`."""

    @property
    def isolates(self) -> bool:
        """True if packed rows may be used."""
        return self.kind != "none"


def choose_route(model: nn.Module) -> PackingRoute:
    """Find the fastest way of computing packed rows that keeps their sequences apart on this very model."""
    reason = refusal(model)
    if reason is None:
        with segment_attention(model):
            reason = probe_isolation(model)
    if reason is None:
        return PackingRoute("segments", "")
    leak = probe_isolation(model)
    return PackingRoute("mask", reason) if leak is None else PackingRoute("none", leak)


def probe_isolation(model: nn.Module) -> str | None:
    """Return None if packed rows, computed as they would be now, keep their sequences apart; else why they do not.

    Random tokens in three sequences are run packed; then the outer two are changed, and the middle one's logits must
    not move; and every sequence's logits must be those it has alone. Mode, gradients and random state are left as they
    were. It costs five forward passes of at most 24 tokens. The answer holds for the route in force (see `packing`).
    """
    name = type(model).__name__
    try:
        with torch.no_grad(), _undisturbed(model):
            return _compare(model)
    except Exception as error:  # whatever a foreign model raises on a packed row is a reason not to pack
        first_line = str(error).partition("\n")[0]
        return f"{name} cannot run a packed row: {type(error).__name__}: {first_line}"


def probe_sharing(model: nn.Module) -> str | None:
    """Return None if sequences that share a beginning in a packed row are computed as each is alone; else why not.

    The row is the beginning and two ends; it goes through segmented attention, which the model must be able to use.
    """
    name = type(model).__name__
    first, second, third = _LENGTHS
    end = first + second + third
    row = (
        Segment(0, first, end),
        Segment(first, first + second, first + second, first),
        Segment(first + second, end, end, first),
    )
    try:
        with torch.no_grad(), _undisturbed(model), segment_attention(model):
            tokens, _ = _random_tokens(model, next(model.parameters()).device)
            positions = torch.cat([torch.arange(one.stop - one.start) + one.offset for one in row])[None]
            found = forward_logits(model, tokens, positions.to(tokens.device), None, row)
            start, *ends = torch.split(tokens, list(_LENGTHS), 1)
            parts = torch.split(found, list(_LENGTHS), 1)[1:]
            alone = [_alone(model, torch.cat((start, end), dim=1))[:, first:] for end in ends]
            distance, allowed = _measure(model)
            off = max(distance(part, one) for part, one in zip(parts, alone, strict=True))
    except Exception as error:  # whatever a foreign model raises on such a row is a reason not to share
        return f"{name} cannot run such a row: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None if off <= allowed else f"{name} computes such a row differently, by {off:.1e} (relative)"


def packing(model: nn.Module, route: PackingRoute) -> AbstractContextManager[None]:
    """Put a route into force for the packed rows of a block, which must hold their backward passes too.

    Everything but packed rows (padding, generation) behaves in the block as it does outside.
    """
    return segment_attention(model) if route.kind == "segments" else nullcontext()


def _compare(model: nn.Module) -> str | None:
    name = type(model).__name__
    device = next(model.parameters()).device
    tokens, others = _random_tokens(model, device)
    packed = _packed_logits(model, tokens)
    if not packed.isfinite().all():
        return f"{name} gives logits that are not finite for a packed row"
    changed = torch.cat((others[:, : _MIDDLE.start], tokens[:, _MIDDLE], others[:, _MIDDLE.stop :]), dim=1)
    moved = _distance(_packed_logits(model, changed)[:, _MIDDLE], packed[:, _MIDDLE])
    if moved > 1e-5:
        return f"{name} lets packed sequences see each other: other neighbours move logits by {moved:.1e} (relative)"
    sizes = list(_LENGTHS)
    parts = zip(torch.split(tokens, sizes, 1), torch.split(packed, sizes, 1), strict=True)
    distance, allowed = _measure(model)
    apart = max(distance(logits, _alone(model, part)) for part, logits in parts)
    if apart > allowed:
        return f"{name} computes a packed sequence differently from the same one alone, by {apart:.1e} (relative)"
    return None


def _measure(model: nn.Module) -> tuple[Callable[[Tensor, Tensor], float], float]:
    """How logits are compared that should be equal, and how far apart they may be."""
    # A row of another length takes another path through the matrix products: 16-bit types differ by 0.06 of the spread
    # over 30 blocks (SmolLM2 in bf16), single logits by 0.25; positions that do not restart change everything.
    precise = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return (_distance, 1e-4) if precise else (_mean_distance, 0.15)


def _random_tokens(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(size, (1, sum(_LENGTHS)), generator=generator)
    # Never the same token in the same place, however small the vocabulary.
    others = (tokens + torch.randint(1, size, tokens.shape, generator=generator)) % size
    return tokens.to(device), others.to(device)


def _packed_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None].to(tokens.device)
    return forward_logits(model, tokens, positions, None, apart(_LENGTHS))


def _alone(model: nn.Module, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return forward_logits(model, tokens, positions, None, None)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the spread of what is expected; infinite if anything is not finite."""
    scale = expected.float().std().clamp_min(1e-12)
    distance = float((found.float() - expected.float()).abs().max() / scale)
    return distance if distance == distance else float("inf")


def _mean_distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square difference, relative to the spread of what is expected; infinite if anything is not finite."""
    scale = expected.float().std().clamp_min(1e-12)
    distance = float((found.float() - expected.float()).square().mean().sqrt() / scale)
    return distance if distance == distance else float("inf")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    with torch.random.fork_rng(devices=cuda_devices(model)), in_eval_mode(model):
        yield
