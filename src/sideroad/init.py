"""What an adapter's tensors are before the first step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sideroad.config import FROM_WEIGHT, SUBTRACTED, AdapterConfig, Init, init_name
from sideroad.methods.dora import start_magnitude
from sideroad.scaling import scale
from sideroad.targets import Target
from sideroad.weights import require_kind


def draw_seed() -> int:
    """Draw a seed from torch's global generator, so that `torch.manual_seed` decides where no seed is given."""
    return int(torch.randint(2**62, (1,)).item())


def starts_as_base(init: Init) -> bool:
    """Whether a fresh adapter adds exactly zero (one factor is 0), so that the model still is its base."""
    return init_name(init) in ("kaiming", "gaussian", "eva")


def start_pair(target: Target, init: str, seed: int, *, looked_up: bool = False) -> dict[str, Tensor]:
    """Return A drawn at random and B of zeros (on embeddings the reverse), in fp32 on the CPU, in the target's shapes.

    Every layer has its own generator, seeded by (seed, path): the tensors depend neither on the device, nor on the
    order of layers, nor on other adapters.

    Args:
        looked_up: the layer is an embedding.
        init: `kaiming`: U(±1/sqrt(in)), which is kaiming_uniform with a = sqrt 5; `gaussian`: standard deviation
            1/rank. Both are PEFT's; the paper says "Gaussian" without a width (arXiv:2106.09685, sec. 4.1). `random`
            draws the zero factor too, U(±1/sqrt(rank)) or N(0, 1). On embeddings B is N(0, 1), as in loralib.
    """
    generator = torch.Generator().manual_seed(_seed_of(seed, target.path))
    A, B = (torch.zeros(shape) for shape in target.shapes)
    if looked_up:
        B.normal_(generator=generator)
        return {"A": A.normal_(generator=generator) if init == "random" else A, "B": B}
    if init == "gaussian":
        A.normal_(0.0, 1 / target.rank, generator=generator)
    else:
        bound = 1 / math.sqrt(math.prod(A.shape[1:]))
        A.uniform_(-bound, bound, generator=generator)
    if init == "random":
        B.uniform_(-1 / math.sqrt(target.rank), 1 / math.sqrt(target.rank), generator=generator)
    return {"A": A, "B": B}


def start_from_weight(weight: Tensor, init: str, rank: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank], in fp32 on the weight's device, whose product is a part of W itself.

    The base keeps that part: the delta subtracts the product at the start (`A0`, `B0`).

    Args:
        weight: W, [out, in].
        init: `pissa`: the leading singular triplets, B = U √(S/s), A = √(S/s) Vᵀ (PiSSA, Meng et al. 2024,
            arXiv:2404.02948, eq. 2-4, with s in it so that s B A is the leading part for any alpha); `pissa-fast`: the
            same from a randomised SVD of 16 iterations (Halko et al. 2011, arXiv:0909.4061); `olora`: B = Q, A = R of
            QR, its first `rank` columns and rows (OLoRA, Büyükakyüz 2024, arXiv:2406.01775, alg. 1).
        scale: s.
        seed: of the randomised SVD.
    """
    wide = weight.detach().float()
    most = min(wide.shape)
    if init == "olora":
        Q, R = torch.linalg.qr(wide)
        return _padded(R[:rank], rank, 0), _padded(Q[:, :rank], rank, 1)
    if init == "pissa-fast" and rank < most:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            # a few directions more than wanted make the last ones exact
            U, S, V = torch.svd_lowrank(wide, q=min(rank + 8, most), niter=16)
        Vh = V.t()
    else:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return _padded(root[:, None] * Vh[:rank], rank, 0), _padded(U[:, :rank] * root, rank, 1)


def start_tensors(
    target: Target | None,
    config: AdapterConfig,
    seed: int,
    layer: nn.Module,
    *,
    bias: bool,
    given: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors that one layer's delta starts from; a meta layer gets meta tensors and nothing is drawn.

    Args:
        target: None where only the bias is trained.
        bias: whether the layer's bias is trained too; it starts as a copy of it, [out].
        given: A and B that were found from data; None draws or computes them.
    """
    tensors: dict[str, Tensor] = {}
    meta = any(parameter.is_meta for parameter in layer.parameters(recurse=False))
    if target is not None:
        tensors = _meta_pair(target) if meta else _start_method_pair(target, config, seed, layer, given)
        if init_name(config.method.init) in SUBTRACTED:
            tensors |= {"A0": tensors["A"].clone(), "B0": tensors["B"].clone()}
        for part, start in STARTS.get(config.method.kind, {}).items():
            tensors[part] = start(layer, target)
    if bias:
        tensors["bias"] = layer.get_parameter("bias").detach().clone()
    return tensors


def _start_method_pair(
    target: Target, config: AdapterConfig, seed: int, layer: nn.Module, given: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """A and B of one layer, in the shapes in which its kind stores them."""
    init = config.method.init
    if given is None and init in FROM_WEIGHT:
        kind = require_kind(layer)
        weight = kind.oriented(layer.get_parameter(kind.weight))
        s = scale(config, target.path, target.rank)
        given = start_from_weight(weight, str(init), target.rank, s, _seed_of(seed, target.path))
    if given is not None:
        return {part: one.reshape(shape) for part, one, shape in zip("AB", given, target.shapes, strict=True)}
    if config.method.kind == "adalora":
        return start_triplets(target, _seed_of(seed, target.path))
    assert isinstance(init, str), "what is found from data is given"
    return start_pair(target, init, seed, looked_up=isinstance(layer, nn.Embedding))


def start_triplets(target: Target, seed: int) -> dict[str, Tensor]:
    """Return A and B of AdaLoRA, both N(0, 0.02) as in the authors' code; E is zero (arXiv:2303.10512, sec. 3.1)."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.empty(shape).normal_(0.0, 0.02, generator=generator) for shape in target.shapes)
    return {"A": A, "B": B}


def _meta_pair(target: Target) -> dict[str, Tensor]:
    return {part: torch.empty(shape, device="meta") for part, shape in zip("AB", target.shapes, strict=True)}


def _padded(part: Tensor, rank: int, dim: int) -> Tensor:
    """Fill up with zeros to the rank, where the layer is narrower."""
    missing = rank - part.shape[dim]
    if missing <= 0:
        return part.contiguous()
    shape = (missing, part.shape[1]) if dim == 0 else (part.shape[0], missing)
    return torch.cat([part, part.new_zeros(shape)], dim=dim)


STARTS: Mapping[str, Mapping[str, Callable[[nn.Module, Target], Tensor]]] = {
    "dora": {"magnitude": lambda layer, target: start_magnitude(layer)},
    "adalora": {"E": lambda layer, target: _like(layer, target)},
}
"""Method kind → name of a tensor beside A and B → what it starts from."""


def _like(layer: nn.Module, target: Target) -> Tensor:
    device = next(layer.parameters(recurse=False)).device
    return torch.zeros(target.shapes[0][0], 1, device="meta" if device.type == "meta" else None)


def _seed_of(seed: int, path: str) -> int:
    digest = hashlib.sha256(f"{seed}\n{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
