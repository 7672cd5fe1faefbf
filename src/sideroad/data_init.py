"""Initialisations that look at training data: EVA at what enters a layer, LoRA-GA at the gradient of its weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sideroad.config import AdapterConfig, EvaInit, LoraGaInit, init_name
from sideroad.errors import ConfigError, TargetError, raise_findings
from sideroad.methods.ranking import largest
from sideroad.modes import in_eval_mode
from sideroad.scaling import with_ranks
from sideroad.targets import Target
from sideroad.weights import require_kind

Batch = Mapping[str, Any]
"""Arguments of the model's forward: input_ids, attention_mask, labels (-100 where nothing is trained)."""

_MOST_BYTES = 1 << 30
"""What the statistics of one pass over the batches may take; more layers take more passes."""
_EXACT_WIDTH = 256
"""Up to this width a decomposition is exact, beyond it randomised."""


@dataclass(frozen=True)
class FoundStart:
    """A configuration whose ranks the data have settled, and A [rank, in], B [out, rank] of each of its layers."""

    config: AdapterConfig
    pairs: Mapping[str, tuple[Tensor, Tensor]]


def start_from_data(
    model: nn.Module, config: AdapterConfig, targets: Mapping[str, Target], batches: Iterable[Batch] | None
) -> FoundStart:
    """Find the start of every pair from a few batches; the model's weights, modes and gradients stay as they are.

    Args:
        model: without this adapter.
        targets: the layers to adapt, all of them linear.
        batches: of training data; as many as the initialisation asks for are used.
    Raises:
        ConfigError: no batches, or no trained token in them.
        TargetError: a layer that no batch has reached, or whose gradient is not its own.
    """
    init = config.method.init
    assert isinstance(init, EvaInit | LoraGaInit), "the others need no data"
    if not targets:
        return FoundStart(config, {})
    used = list(islice(batches or (), init.batches))
    if not used:
        raise ConfigError(
            f"init: {init_name(init)} looks at training data, and there is none; pass attach(..., batches=[...]) "
            "with the arguments of the model's forward, input_ids and labels among them."
        )
    if not any(_says_something(batch) for batch in used):
        raise ConfigError(
            f"init: {init_name(init)} looks at trained tokens, and no batch has any: their labels are all -100."
        )
    with in_eval_mode(model):
        return _eva(model, config, init, targets, used) if isinstance(init, EvaInit) else _lora_ga(
            model, config, init, targets, used
        )  # fmt: skip


def _eva(
    model: nn.Module, config: AdapterConfig, init: EvaInit, targets: Mapping[str, Target], batches: Sequence[Batch]
) -> FoundStart:
    """Leading right singular vectors of what enters each layer (EVA, arXiv:2410.07170, sec. 3), ranks dealt by the
    share of its inputs' energy that a direction explains (eq. 4); s stays what it was. B is zero.

    The decomposition is that of XᵀX over all batches, so nothing hangs on their order. Layers that read one tensor
    share it.
    """
    leaders = _leaders(model, targets, batches[0])
    directions: dict[str, tuple[Tensor, Tensor]] = {}
    for some in _passes({leader: targets[leader].in_features ** 2 for leader in dict.fromkeys(leaders.values())}):
        for leader, gram in _grams(model, some, batches).items():
            asking = [path for path, one in leaders.items() if one == leader]
            most = max(_most(targets[path], init.rho) for path in asking)
            directions[leader] = _leading(gram, most)
    _refuse_unreached([path for path, leader in leaders.items() if leader not in directions], "eva")
    shares = {path: directions[leader][0][: _most(targets[path], init.rho)] for path, leader in leaders.items()}
    ranks = {path: min(target.rank, len(shares[path])) for path, target in targets.items()}
    if init.rho > 1:
        ranks = {path: int(mask.sum()) for path, mask in largest(shares, sum(ranks.values())).items()}
    gone = tuple(f"re:{re.escape(path)}" for path, rank in ranks.items() if not rank)
    kept = {path: rank for path, rank in ranks.items() if rank}
    settled = with_ranks(config, kept).model_copy(update={"exclude": (*config.exclude, *gone)})
    pairs = {}
    for path, rank in kept.items():
        rows = directions[leaders[path]][1][:rank]
        pairs[path] = rows.clone(), rows.new_zeros(targets[path].out_features, rank)
    return FoundStart(settled, pairs)


def _lora_ga(
    model: nn.Module, config: AdapterConfig, init: LoraGaInit, targets: Mapping[str, Target], batches: Sequence[Batch]
) -> FoundStart:
    """A = k V₁..ᵣᵀ and B = k Uᵣ₊₁..₂ᵣ of the weight's gradient U S Vᵀ, k = out^¼ / √γ (LoRA-GA, arXiv:2407.05000, thm
    3.1 and 3.2, as the authors' code has it): of all pairs of this rank, their first step comes nearest to that of W.
    """
    shared = [
        f"{path} shares its weight with {', '.join(others)}, so its own gradient cannot be told apart; exclude it."
        for path in targets
        if (others := _sharing(model, path))
    ]
    raise_findings(TargetError, "init: lora-ga", shared)
    pairs = {}
    for some in _passes({path: target.in_features * target.out_features for path, target in targets.items()}):
        gradients = _gradients(model, some, batches)
        for path in some:
            target, gradient = targets[path], gradients[path]
            if not bool(gradient.any()):
                _refuse_unreached([path], "lora-ga")
            U, V = _singular_vectors(gradient, 2 * target.rank)
            k = target.out_features**0.25 / init.gamma**0.5
            pairs[path] = k * V[:, : target.rank].t(), k * U[:, target.rank : 2 * target.rank]
    return FoundStart(config, pairs)


def _leaders(model: nn.Module, targets: Mapping[str, Target], batch: Batch) -> dict[str, str]:
    """Return, for each layer, the first of those that are called with the same tensors, unchanged in between."""
    calls: dict[str, list[tuple[int, int]]] = {path: [] for path in targets}
    kept: list[Tensor] = []

    def look(path: str, x: Tensor) -> None:
        # the tensor is kept, so that no later one gets its id
        kept.append(x)
        calls[path].append((id(x), 0 if x.is_inference() else x._version))

    with torch.no_grad(), _watched(model, targets, look):
        model(**batch)
    first: dict[tuple[tuple[int, int], ...], str] = {}
    # one that this batch does not reach stands for itself: another may
    return {path: first.setdefault(tuple(seen), path) if seen else path for path, seen in calls.items()}


@torch.no_grad()
def _grams(model: nn.Module, paths: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the sum of x xᵀ over the tokens of all batches, [in, in] in fp32, for each layer."""
    grams: dict[str, Tensor] = {}
    for batch in batches:
        wanted = _trained(batch)

        def add(path: str, x: Tensor, wanted: Tensor | None = wanted) -> None:
            rows = x.reshape(-1, x.shape[-1]).float()
            if wanted is not None and x.shape[:-1] == wanted.shape:
                rows = rows[wanted.to(x.device).reshape(-1)]
            grams[path] = grams[path].addmm_(rows.t(), rows) if path in grams else rows.t() @ rows

        with _watched(model, paths, add):
            model(**batch)
    return grams


def _gradients(model: nn.Module, paths: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the mean over batches of the loss's gradient at each layer's weight, [out, in] in fp32."""
    weights = {path: _weight(model, path) for path in paths}
    total = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in weights.items()}
    with _only_trainable(model, list(weights.values())), torch.enable_grad():
        for batch in batches:
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                raise ConfigError("init: lora-ga needs a loss; give labels in the batches.")
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for path, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    total[path].add_(gradient, alpha=1 / len(batches))
    broken = [f"{path} has a gradient that is not finite." for path, one in total.items() if not one.isfinite().all()]
    raise_findings(TargetError, "init: lora-ga", broken)
    return {path: require_kind(model.get_submodule(path)).oriented(one) for path, one in total.items()}


def _leading(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues as shares of the trace, [count], and their vectors as rows, [count, in]."""
    whole = gram.diagonal().sum().clamp_min(torch.finfo(gram.dtype).tiny)
    if len(gram) <= _EXACT_WIDTH:
        values, vectors = torch.linalg.eigh(gram.double())
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    else:
        vectors, values, _ = _svd(gram, count)
    return (values / whole).float().cpu(), vectors.t().float().contiguous()


def _singular_vectors(gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the leading left and right singular vectors as columns."""
    if min(gradient.shape) <= _EXACT_WIDTH:
        U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        return U[:, :count], Vh.t()[:, :count]
    U, _, V = _svd(gradient, count)
    return U, V


def _svd(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, q=min(count + 8, *matrix.shape), niter=8)
    return U[:, :count], S[:count], V[:, :count]


def _most(target: Target, rho: float) -> int:
    return min(int(rho * target.rank), target.in_features, target.out_features)


def _passes(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Deal layers into passes whose statistics, given in numbers of fp32, fit the memory for one."""
    some: list[str] = []
    taken = 0
    for path, size in sizes.items():
        if some and taken + 4 * size > _MOST_BYTES:
            yield some
            some, taken = [], 0
        some.append(path)
        taken += 4 * size
    if some:
        yield some


def _says_something(batch: Batch) -> bool:
    """Whether a batch has a token to look at."""
    wanted = _trained(batch)
    return wanted is None or bool(wanted.any())


def _trained(batch: Batch) -> Tensor | None:
    """Return which tokens of a batch are trained on, or at least not padding; None where it does not say."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return labels != -100
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


@contextmanager
def _watched(model: nn.Module, paths: Any, look: Any) -> Iterator[None]:
    """Call `look(path, input)` whenever one of the layers is called."""
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                look(path, args[0] if args else next(iter(kwargs.values())))

            handle = model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _only_trainable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def _sharing(model: nn.Module, path: str) -> list[str]:
    """Return the other modules that hold a layer's weight."""
    weight, own = _weight(model, path), model.get_submodule(path)
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, one in modules if one is not own and any(p is weight for p in one._parameters.values())]


def _weight(model: nn.Module, path: str) -> nn.Parameter:
    layer = model.get_submodule(path)
    return layer.get_parameter(require_kind(layer).weight)


def _refuse_unreached(paths: Sequence[str], name: str) -> None:
    findings = [f"{path} was not reached by any batch; exclude it, or give batches that use it." for path in paths]
    raise_findings(TargetError, f"init: {name}", findings)
