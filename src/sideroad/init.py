"""What an adapter's tensors are before the first step."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from sideroad.config import Init
from sideroad.targets import Target


def draw_seed() -> int:
    """Draw a seed from torch's global generator, so that `torch.manual_seed` decides where no seed is given."""
    return int(torch.randint(2**62, (1,)).item())


def starts_as_base(init: Init) -> bool:
    """Whether a fresh adapter adds exactly zero (one factor is 0), so that the model still is its base."""
    return init in ("kaiming", "gaussian")


def start_pair(target: Target, init: Init, seed: int, *, looked_up: bool = False) -> dict[str, Tensor]:
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


def start_tensors(target: Target | None, init: Init, seed: int, layer: nn.Module, *, bias: bool) -> dict[str, Tensor]:
    """Return the tensors that one layer's delta starts from; a meta layer gets meta tensors and nothing is drawn.

    Args:
        target: None where only the bias is trained.
        bias: whether the layer's bias is trained too; it starts as a copy of it, [out].
    """
    tensors: dict[str, Tensor] = {}
    meta = any(parameter.is_meta for parameter in layer.parameters(recurse=False))
    if target is not None and meta:
        tensors = {part: torch.empty(shape, device="meta") for part, shape in zip("AB", target.shapes, strict=True)}
    elif target is not None:
        tensors = start_pair(target, init, seed, looked_up=isinstance(layer, nn.Embedding))
    if bias:
        tensors["bias"] = layer.get_parameter("bias").detach().clone()
    return tensors


def _seed_of(seed: int, path: str) -> int:
    digest = hashlib.sha256(f"{seed}\n{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
