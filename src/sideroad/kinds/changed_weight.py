"""A stacked weight with changes of low rank, which are multiplied where the weight would be instead of added to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

KNOWN = ("eager", "grouped_mm", "batched_mm")
"""transformers' ways of computing experts whose use of the weight is known here: an index, a transpose, a product."""

_ALIGNED_BYTES = 16
"""What torch's grouped product wants rows to be a multiple of."""


class Pair(NamedTuple):
    """A change `factor · left @ right` of every matrix in a stack: [..., rows, rank] and [..., rank, columns]."""

    left: Tensor
    right: Tensor
    factor: float


class ChangedWeight:
    """Stands for `weight + Σ factor · left @ right`, [..., rows, columns], in the forward of an experts module.

    Indexing and transposing give another one; a product with it is the weight's own and, beside it, two thin ones, so
    that no expert's matrix is made, whether tokens visit it or not, and nothing of the weight's size is kept for the
    backward pass. For whatever else is asked of it, it becomes the tensor that it stands for.

    Args:
        weight: the base's, in the orientation in which it is stored.
        pairs: in the dtype of the products.
    """

    def __init__(self, weight: Tensor, pairs: Sequence[Pair]) -> None:
        self.weight = weight
        self.pairs = tuple(pairs)

    def dense(self) -> Tensor:
        """Return the tensor itself: summed in fp32 or wider, rounded once."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        total = self.weight.to(wide)
        for left, right, factor in self.pairs:
            total = total + factor * (left.to(wide) @ right.to(wide))
        return total.to(self.weight.dtype)

    def __getitem__(self, index: Any) -> Any:
        """Return the matrices of one expert or of several."""
        if not isinstance(index, int | Tensor):
            return self.dense()[index]
        return ChangedWeight(self.weight[index], [Pair(one[index], two[index], f) for one, two, f in self.pairs])

    def transpose(self, first: int, second: int) -> Any:
        """Return every matrix turned round; another exchange of dimensions gives a tensor."""
        count = self.weight.ndim
        if {first % count, second % count} != {count - 2, count - 1}:
            return self.dense().transpose(first, second)
        pairs = [Pair(right.transpose(-2, -1), left.transpose(-2, -1), f) for left, right, f in self.pairs]
        return ChangedWeight(self.weight.transpose(-2, -1), pairs)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return each matrix times x."""
        y = self.weight @ x
        for left, right, factor in self.pairs:
            y = y + factor * (left @ (right @ x))
        return y

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """Return x times each matrix."""
        y = x @ self.weight
        for left, right, factor in self.pairs:
            y = y + factor * ((x @ left) @ right)
        return y

    def __getattr__(self, name: str) -> Any:
        """Shape, type and place are the weight's; all else is the tensor's."""
        if name.startswith("__") or name in ("weight", "pairs"):
            raise AttributeError(name)
        known = name in ("shape", "dtype", "device", "ndim", "size", "dim", "numel", "layout", "is_cuda", "itemsize")
        return getattr(self.weight if known else self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one of torch's functions: products as above, others on the tensors that are stood for."""
        given = dict(kwargs or {})
        x, other = (args[0], args[1]) if len(args) == 2 else (None, None)
        if isinstance(other, ChangedWeight) and isinstance(x, Tensor):
            if func in (torch.matmul, torch.mm, torch.bmm) or (func.__name__ in _PRODUCTS and not given):
                return other.__rmatmul__(x)
            if func is torch._grouped_mm and given.keys() <= {"offs", *(k for k in given if given[k] is None)}:
                return _grouped(x, other, given.get("offs"))
        if isinstance(x, ChangedWeight) and isinstance(other, Tensor) and func in (torch.matmul, torch.mm, torch.bmm):
            return x @ other
        if func is functional.linear and len(args) >= 2 and isinstance(args[1], ChangedWeight):
            return _linear(*args, **given)
        return func(*map(_tensor, args), **{name: _tensor(value) for name, value in given.items()})


_PRODUCTS = ("matmul", "__matmul__", "bmm", "mm")


def multiplies(owner: nn.Module) -> bool:
    """Whether an experts module uses its weights in a way that a `ChangedWeight` is made for; else it gets tensors."""
    chosen = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    return chosen in KNOWN and not torch.compiler.is_compiling()


def _linear(x: Tensor, weight: ChangedWeight, bias: Tensor | None = None) -> Tensor:
    y = functional.linear(x, weight.weight, bias)
    for left, right, factor in weight.pairs:
        y = y + factor * functional.linear(functional.linear(x, right), left)
    return y


def _grouped(x: Tensor, weight: ChangedWeight, offs: Tensor | None) -> Tensor:
    """x [tokens, rows] times each expert's matrix, rows of x being sorted by expert."""
    y = functional.grouped_mm(x, weight.weight, offs=offs)
    for left, right, factor in weight.pairs:
        short = -left.shape[-1] % (_ALIGNED_BYTES // left.itemsize)
        # zeros in the rank: it is the last dimension in memory of one of the factors
        wide_left = _padded(left, short)
        wide_right = _padded(right.transpose(-2, -1), short).transpose(-2, -1)
        y = y + factor * functional.grouped_mm(functional.grouped_mm(x, wide_left, offs=offs), wide_right, offs=offs)
    return y


def _padded(factor: Tensor, by: int) -> Tensor:
    """Widen [experts, n, rank]; its memory keeps the order that it has."""
    if factor.stride(-1) == 1:
        return functional.pad(factor, (0, by)) if by else factor
    return functional.pad(factor.transpose(-2, -1), (0, 0, 0, by)).transpose(-2, -1) if by else factor


def _tensor(value: Any) -> Any:
    if isinstance(value, ChangedWeight):
        return value.dense()
    return type(value)(map(_tensor, value)) if type(value) in (list, tuple) else value
