"""The elementwise pieces of a decoder block, each in one function, so that a compiler can make one pass of it.

Every piece is a pure function of tensors. `EAGER` holds them as they are; `compiled()` holds them through torch.compile
(C++ on CPUs, Triton on GPUs) for any number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Activation = Literal["silu", "gelu", "gelu_tanh"]
NormStyle = Literal["round_first", "round_last", "one_plus"]
"""How an RMSNorm of a 16-bit model rounds: before its weight acts, after it, or after (1 + weight)."""


def activate(e: Tensor, activation: Activation) -> Tensor:
    """Return the activation of e."""
    if activation == "silu":
        return functional.silu(e)
    return functional.gelu(e, approximate="tanh" if activation == "gelu_tanh" else "none")


def gate(e: Tensor, g: Tensor, activation: Activation) -> Tensor:
    """Return h = act(e) · g."""
    return activate(e, activation) * g


def gate_backward(dh: Tensor, e: Tensor, g: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Return h again, and the gradients of e and g."""
    f = activate(e, activation)
    inner = dh * g
    if activation == "silu":
        de = torch.ops.aten.silu_backward(inner, e)
    else:
        de = torch.ops.aten.gelu_backward(inner, e, approximate="tanh" if activation == "gelu_tanh" else "none")
    return f * g, de, dh * f


def norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> tuple[Tensor, Tensor]:
    """Return the RMSNorm of x (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4), and 1/rms of each row.

    Args:
        x: [tokens, width].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled(x, inverse, weight, style), inverse


def scaled(x: Tensor, inverse: Tensor, weight: Tensor, style: NormStyle) -> Tensor:
    """Return the RMSNorm of x, given 1/rms of each row."""
    wide = x.to(inverse.dtype)
    if style == "round_first":
        return weight * (wide * inverse).to(x.dtype)
    return (wide * inverse * _acting(weight, inverse.dtype, style)).to(x.dtype)


def norm_backward(dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, style: NormStyle) -> Tensor:
    """Return the gradient of the RMSNorm's input; the weight is frozen."""
    wide = x.to(inverse.dtype)
    dn = dy.to(inverse.dtype) * _acting(weight, inverse.dtype, style)
    shared = (dn * wide).mean(-1, keepdim=True) * inverse.pow(3)
    return (dn * inverse - wide * shared).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with its halves rotated against each other (Su et al. 2021, arXiv:2104.09864, sec. 3.4.2).

    Args:
        x: [tokens, heads, width].
        cos: [tokens, 1, width], likewise sin.
    """
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return rotated


def rotate_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of `rotate`'s input."""
    half = dy.shape[-1] // 2
    dx = dy * cos
    dx[..., :half].addcmul_(dy[..., half:], sin[..., half:])
    dx[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1)
    return dx


def exponentials(z: Tensor) -> tuple[Tensor, Tensor]:
    """Turn z into exp(z - peak) in place; return each row's peak and the sum of its exponentials, [rows, 1].

    Args:
        z: [rows, vocabulary].
    """
    peak = z.amax(dim=-1, keepdim=True)
    return peak, z.sub_(peak).exp_().sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Pieces:
    """One set of the functions of this module."""

    kind: Literal["eager", "compiled"]
    gate: Callable[[Tensor, Tensor, Activation], Tensor]
    gate_backward: Callable[[Tensor, Tensor, Tensor, Activation], tuple[Tensor, Tensor, Tensor]]
    norm: Callable[[Tensor, Tensor, float, NormStyle], tuple[Tensor, Tensor]]
    scaled: Callable[[Tensor, Tensor, Tensor, NormStyle], Tensor]
    norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, NormStyle], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotate_backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    exponentials: Callable[[Tensor], tuple[Tensor, Tensor]]


FUNCTIONS: tuple[Callable[..., object], ...] = (
    gate, gate_backward, norm, scaled, norm_backward, rotate, rotate_backward, exponentials
)  # fmt: skip

EAGER = Pieces("eager", gate, gate_backward, norm, scaled, norm_backward, rotate, rotate_backward, exponentials)


def _acting(weight: Tensor, dtype: torch.dtype, style: NormStyle) -> Tensor:
    return 1.0 + weight.to(dtype) if style == "one_plus" else weight.to(dtype)
