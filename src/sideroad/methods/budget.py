"""AdaLoRA's budget: which triplets of all layers together are worth keeping, and how many while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sideroad.config import AdaloraMethod
from sideroad.errors import CheckpointError
from sideroad.methods import parts_of
from sideroad.methods.adalora import AdaloraDelta
from sideroad.methods.ranking import largest

_PARTS = ("A", "B", "E")


class Budget:
    """Deals a shrinking number of triplets to layers by importance (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512).

    In every step, between the gradients and the optimizer: `observe` takes the sensitivities, from the task's gradient
    as it is; `regularise` adds that of the orthogonality term, after clipping, so that neither hides the other. After
    the optimizer `prune` sets E of the triplets beyond the budget to zero. Until the final phase a triplet that was
    pruned may come back; then the choice is made once for good.

    Sensitivity is |w · gradient| of the weights that the gradient belongs to, as in the paper's algorithm 1; PEFT and
    the authors' code take the weights after the optimizer's step instead. The orthogonality term has the paper's
    squares (eq. 4), averaged over the matrices as in both codes, whose weights of 0.1 to 0.5 are meant for an average:
    summed over a model's layers it would drown the task. Both codes leave out the square, and so have a gradient that
    does not vanish where P and Q are orthogonal.

    Args:
        deltas: all of the adapter's, by path; what has no triplets (biases, rows, whole modules) goes into the state.
        steps: of the whole run.
    """

    def __init__(self, deltas: Mapping[str, nn.Module], method: AdaloraMethod, steps: int) -> None:
        self.method, self.steps = method, steps
        self._deltas = {path: one for path, one in deltas.items() if isinstance(one, AdaloraDelta)}
        parts = ((path, parts_of(delta)) for path, delta in deltas.items())
        self._values = {f"{path}.{part}": one for path, found in parts for part, one in found.items()}
        self._start = sum(len(delta.E) for delta in self._deltas.values())
        self._target = max(1, round(self._start * method.target_rank / method.rank))
        self._warmup, self._final = int(method.warmup * steps), int(method.final * steps)
        self._smoothed = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in self._named().items()}
        self._uncertain = {name: torch.zeros_like(one) for name, one in self._smoothed.items()}
        self._kept: dict[str, Tensor] | None = None

    def settled(self, step: int) -> bool:
        """Whether the ranks after a step, counted from 1, are those of the end."""
        return step > self._warmup and step >= self.steps - self._final

    def size(self, step: int) -> int:
        """Return how many triplets there may be after a step, counted from 1: the paper's cubic schedule (sec. 3.3)."""
        if step <= self._warmup:
            return self._start
        if step >= self.steps - self._final:
            return self._target
        passed = (step - self._warmup) / (self.steps - self._warmup - self._final)
        return self._target + int((self._start - self._target) * (1 - passed) ** 3)

    @torch.no_grad()
    def regularise(self) -> None:
        """Add the gradient of γ times the mean of ‖PᵀP - I‖² and ‖QQᵀ - I‖² over all layers to those of P and Q."""
        gamma = self.method.orthogonality / (2 * len(self._deltas))
        if not gamma:
            return
        for delta in self._deltas.values():
            Q, P = delta.A.flatten(1), delta.B.flatten(1).t()
            for rows, parameter, columns in ((Q, delta.A, False), (P, delta.B, True)):
                if parameter.grad is None:
                    continue
                wide = rows.float()
                off = wide @ wide.t()
                off.diagonal().sub_(1)
                change = (off @ wide).mul_(4 * gamma)
                change = change.t() if columns else change
                parameter.grad.add_(change.reshape(parameter.shape).to(parameter.dtype))

    @torch.no_grad()
    def observe(self) -> None:
        """Smooth the sensitivity of every value and its uncertainty (eq. 9 and 10), from the present gradients."""
        beta1, beta2 = self.method.beta1, self.method.beta2
        for name, parameter in self._named().items():
            if parameter.grad is None:
                continue
            found = (parameter.float() * parameter.grad.float()).abs()
            smoothed = self._smoothed[name].lerp_(found, 1 - beta1)
            self._uncertain[name].lerp_((found - smoothed).abs(), 1 - beta2)

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """Set E of the triplets beyond the budget to zero, where this step, counted from 1, is one of pruning."""
        if self.settled(step):
            if self._kept is None:
                self._kept = self._choose(self._target)
            self._mask(self._kept)
        elif step > self._warmup and step % self.method.every == 0:
            self._mask(self._choose(self.size(step)))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that `state_tensors` gives, the final choice included, made or not."""
        every = [f"{name}/{what}" for name in self._smoothed for what in ("sensitivity", "uncertainty")]
        return (*every, *(f"{name}/value" for name in self._values), *(f"{path}.E/kept" for path in self._deltas))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything that a resumed run needs: values, statistics and the final choice, by name."""
        found = {f"{name}/value": one.clone() for name, one in self._values.items()}
        found |= {f"{name}/sensitivity": one.clone() for name, one in self._smoothed.items()}
        found |= {f"{name}/uncertainty": one.clone() for name, one in self._uncertain.items()}
        if self._kept is not None:
            found |= {f"{path}.E/kept": one.clone() for path, one in self._kept.items()}
        return found

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave.

        Raises:
            CheckpointError: tensors are missing.
        """
        missing = [name for name in self.names if name not in tensors and not name.endswith("/kept")]
        if missing:
            shown = ", ".join(missing[:4])
            raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors of AdaLoRA's state, such as {shown}.")
        for name, value in self._values.items():
            value.copy_(tensors[f"{name}/value"])
        for name in self._smoothed:
            self._smoothed[name].copy_(tensors[f"{name}/sensitivity"])
            self._uncertain[name].copy_(tensors[f"{name}/uncertainty"])
        kept = {path: tensors[f"{path}.E/kept"] for path in self._deltas if f"{path}.E/kept" in tensors}
        self._kept = {path: one.to(self._deltas[path].E.device) for path, one in kept.items()} or None

    def importance(self) -> dict[str, Tensor]:
        """Return the score of every triplet, [rank] a layer: its E's, plus the means of its P's and Q's (eq. 7)."""

        def score(path: str, part: str) -> Tensor:
            both = self._smoothed[f"{path}.{part}"] * self._uncertain[f"{path}.{part}"]
            return both.flatten(1).mean(0 if part == "B" else 1)

        return {path: sum((score(path, part) for part in _PARTS), torch.zeros(())) for path in self._deltas}

    def _choose(self, count: int) -> dict[str, Tensor]:
        """Return which triplets are among the `count` most important."""
        chosen = largest(self.importance(), count)
        return {path: mask.to(self._deltas[path].E.device) for path, mask in chosen.items()}

    def _mask(self, kept: Mapping[str, Tensor]) -> None:
        for path, delta in self._deltas.items():
            delta.E.masked_fill_(~kept[path][:, None], 0.0)

    def _named(self) -> dict[str, Tensor]:
        return {f"{path}.{part}": getattr(delta, part) for path, delta in self._deltas.items() for part in _PARTS}


def budget_for(deltas: Mapping[str, nn.Module], method: object, steps: int) -> Budget | None:
    """Return the budget of an AdaLoRA adapter; None for every other method, and where no layer has a pair.

    Args:
        deltas: the adapter's, by path (`Attached.deltas`).
    """
    there = any(isinstance(one, AdaloraDelta) for one in deltas.values())
    return Budget(deltas, method, steps) if isinstance(method, AdaloraMethod) and there else None
