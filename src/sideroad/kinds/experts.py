"""Fused experts: one parameter holds the weights of all experts of a mixture, and the module around it reads it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sideroad.kinds.changed_weight import Pair
from sideroad.kinds.kind import Seam


class ExpertWeight(nn.Module):
    """One stacked weight of an experts module, seen as a layer of its own: `…experts.gate_up_proj`.

    It is made when somebody asks for such a path (`layer_at`) and is no part of the model: it holds the experts'
    own parameter as `weight`, so what is written into that is written into the model.

    Args:
        owner: the experts module; its forward reads the parameter.
        name: of the parameter.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a child of this view
        self.name = name
        self._parameters["weight"] = owner._parameters[name]
        self.transposed = bool(getattr(owner, "is_transposed", False))
        """Whether it is stored as [experts, in, out]; what the module itself says, as transformers and PEFT ask it.
        Llama 4 does not say so: its pairs act on the transposed weight, here as in PEFT."""

    @property
    def owner(self) -> nn.Module:
        """The experts module."""
        owner: nn.Module = self.__dict__["owner"]
        return owner

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.get_parameter("weight").shape[0]

    def extra_repr(self) -> str:
        """Show the parameter's name and shape."""
        return f"{self.name}, {list(self.get_parameter('weight').shape)}"


class Experts:
    """Weights [experts, out, in] (or [experts, in, out]), seen as [experts * out, in]: the experts one above another.

    One pair of `rank` for each expert: A [experts * rank, in], B [experts * out, rank], the expert slowest in both.
    PEFT's files hold B as [out, rank * experts] with the expert fastest (`peft_experts.py`).
    """

    name: str | None = "experts"
    weight = "weight"
    bias: str | None = None
    seam: Seam = "owner"
    linear = False

    def claims(self, layer: nn.Module) -> bool:
        """Whether it is the view of a stacked weight that is not transposed."""
        return isinstance(layer, ExpertWeight) and not layer.transposed

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Return (experts * out, in)."""
        experts, out_features, in_features = self._shape(layer)
        return experts * out_features, in_features

    def oriented(self, weight: Tensor) -> Tensor:
        """Return the experts' weights one above another."""
        return weight.reshape(-1, weight.shape[2])

    def stored(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return the experts apart again."""
        return weight.reshape(self._shape(layer))

    def pair_shapes(self, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return [experts * rank, in] and [experts * out, rank]."""
        experts, out_features, in_features = self._shape(layer)
        return (experts * rank, in_features), (experts * out_features, rank)

    def dropped(self, x: Tensor, probability: float) -> tuple[Tensor, Tensor | float]:
        """Never asked: there is no branch to drop from, so dropout is refused before."""
        raise AssertionError("experts read their weight and have no branch")

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, factor: Tensor | float) -> Tensor:
        """Never asked: the experts' forward reads the changed weight."""
        raise AssertionError("experts read their weight and have no branch")

    def product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Never asked: which expert a row of x is for, only the experts' forward knows."""
        raise AssertionError("experts read their weight and have no branch")

    def spread_bias(self, layer: nn.Module, bias: Tensor) -> Tensor:
        """Never asked: a stacked weight has no bias of its own to train."""
        raise AssertionError("a stacked weight has no bias")

    def changed(self, weight: Tensor, A: Tensor, B: Tensor, factor: float) -> Tensor:
        """Return weight_e + factor · B_e A_e for every expert e, in the stored orientation.

        Args:
            weight: as it is stored, in the dtype of the sum.
            A: [experts * rank, in], in the same dtype.
            B: [experts * out, rank], likewise.
        """
        A, B = per_expert(A, B, weight.shape[0])
        return torch.baddbmm(weight, B, A, alpha=factor)

    def pair(self, A: Tensor, B: Tensor, experts: int, factor: float) -> Pair:
        """Return the change of each expert's matrix, in the stored orientation."""
        A, B = per_expert(A, B, experts)
        return Pair(B, A, factor)

    def _shape(self, layer: nn.Module) -> tuple[int, int, int]:
        experts, out_features, in_features = layer.get_parameter(self.weight).shape
        return experts, out_features, in_features


class TransposedExperts(Experts):
    """As `Experts`, stored as [experts, in, out] (gpt-oss)."""

    def claims(self, layer: nn.Module) -> bool:
        """Whether it is the view of a stacked weight whose module says that it is transposed."""
        return isinstance(layer, ExpertWeight) and layer.transposed

    def oriented(self, weight: Tensor) -> Tensor:
        """Return the experts' weights one above another, turned round: a copy."""
        return weight.transpose(1, 2).reshape(-1, weight.shape[1])

    def stored(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Return the experts apart and turned round again."""
        return weight.reshape(self._shape(layer)).transpose(1, 2)

    def changed(self, weight: Tensor, A: Tensor, B: Tensor, factor: float) -> Tensor:
        """Return weight_e + factor · (B_e A_e)ᵀ for every expert e."""
        A, B = per_expert(A, B, weight.shape[0])
        return torch.baddbmm(weight, A.transpose(1, 2), B.transpose(1, 2), alpha=factor)

    def pair(self, A: Tensor, B: Tensor, experts: int, factor: float) -> Pair:
        """Return the change of each expert's matrix, in the stored orientation."""
        A, B = per_expert(A, B, experts)
        return Pair(A.transpose(1, 2), B.transpose(1, 2), factor)

    def _shape(self, layer: nn.Module) -> tuple[int, int, int]:
        experts, in_features, out_features = layer.get_parameter(self.weight).shape
        return experts, out_features, in_features


def per_expert(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return a pair's factors by expert, [experts, rank, in] and [experts, out, rank]; views."""
    return A.view(experts, -1, A.shape[1]), B.view(experts, -1, B.shape[1])


def expert_weights(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's stacked weights: floating-point, of three dimensions, `num_experts` the first.

    Known by structure, so that it holds for every mixture of transformers and for one's own that says how many experts
    it has. Packed weights are none, and neither are the experts of a `ModuleList`, which are linear layers.
    """
    count = getattr(module, "num_experts", None)
    if type(count) is not int or isinstance(module, ExpertWeight):
        return ()
    return tuple(name for name, one in module._parameters.items() if _stacked(one, count))


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, or the view of a stacked weight where the path ends in its name.

    Raises:
        AttributeError: there is neither.
    """
    found: nn.Module | None = model
    *owners, name = path.split(".") if path else [""]
    for part in owners:
        found = None if found is None else found._modules.get(part)
    if found is not None and name not in found._modules and name in expert_weights(found):
        return ExpertWeight(found, name)
    # asked by hand, as this is asked for every layer of every adapter; what is not there is for torch to say
    inner = found._modules.get(name) if found is not None and name else found
    return model.get_submodule(path) if inner is None else inner


def holder_of(layer: nn.Module) -> nn.Module:
    """Return the module of the model that a layer is: of a stacked weight, the experts module around it."""
    return layer.owner if isinstance(layer, ExpertWeight) else layer


def same_layer(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers are the same, two views of one stacked weight included."""
    if isinstance(one, ExpertWeight) and isinstance(other, ExpertWeight):
        own = one.get_parameter("weight")
        return one.owner is other.owner and one.name == other.name and own is other.get_parameter("weight")
    return one is other


def routers(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths of linear layers that choose experts, or weigh a shared one: normally they stay frozen.

    They stand in the block around an experts module, alone or as the only linear layer of a module in it, and have one
    output for each expert, or one in all. (Most mixtures of transformers 5 have routers of classes of their own, which
    are no linear layers and are never adapted.)

    Args:
        modules: path → module of a whole model.
    """
    found: set[str] = set()
    for path, module in modules.items():
        if not expert_weights(module):
            continue
        block = path.rpartition(".")[0]
        count = module.num_experts
        for name, child in modules[block]._modules.items() if path else ():
            inner = [] if child is None else list(child.named_modules())
            linear = [(at, one) for at, one in inner if isinstance(one, nn.Linear)]
            if len(linear) == 1 and linear[0][1].out_features in (1, count):
                found.add(".".join(part for part in (block, name, linear[0][0]) if part))
    return found


def _stacked(weight: Tensor | None, count: int) -> bool:
    return weight is not None and weight.ndim == 3 and weight.shape[0] == count and weight.is_floating_point()
