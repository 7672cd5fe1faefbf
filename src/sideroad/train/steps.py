"""One optimizer step: gradients over its micro-batches, normalised once, judged, and then applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from sideroad.data.batches import Batch
from sideroad.errors import TrainingError
from sideroad.methods.budget import Budget
from sideroad.train import optimizer as adamw
from sideroad.train.progress import Progress
from sideroad.train.schedule import factor
from sideroad.train.seeds import derive
from sideroad.train.settings import OptimConfig
from sideroad.train.watchdog import StepReport, Watchdog

LARGEST_SCALE = 2.0**16
SCALE_DOUBLES_AFTER = 2000


@dataclass(frozen=True)
class Prepared:
    """A step whose gradients stand on the parameters, judged sound, not yet applied."""

    progress: Progress
    loss: float
    lr: float
    grad_norm: float


class Stepper:
    """Takes optimizer steps on an adapter.

    The loss of a step is the mean over all its trained tokens: each micro-batch's sum is divided by the total of the
    whole step, known before the first forward pass, so k accumulated micro-batches equal one batch. An fp16 base gets
    its loss scaled by a power of two, halved and the step repeated when a gradient overflows.

    Args:
        parameters: trainable ones, by name.
        loss_of: gives the summed loss of a micro-batch, see `Execution.loss_of`.
        budget: of an AdaLoRA adapter; None for the others.
        looked_up: paths of embeddings whose A starts at zero, where A and B change roles.
        steps: length of the run, for the schedule.
        seed: of dropout, from which every micro-batch derives its own.
        experts: name of a parameter that holds a pair for each of several experts → how many; in a step in which no
            token visits an expert, its pair stays as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        watchdog: Watchdog,
        *,
        loss_of: Callable[[Batch], Tensor],
        steps: int,
        seed: int,
        budget: Budget | None = None,
        looked_up: Collection[str] = (),
        experts: Mapping[str, int] | None = None,
    ) -> None:
        self.optimizer: AdamW = adamw.build(parameters, config, looked_up)
        self.budget = budget
        self._named = dict(parameters)
        self._model = model
        self._parameters = list(parameters.values())
        self._experts = {parameters[name]: count for name, count in (experts or {}).items()}
        self._config = config
        self._watchdog = watchdog
        self._loss_of = loss_of
        self._steps = steps
        self._seed = seed

    def prepare(self, progress: Progress, batches: Sequence[Batch], sources: Sequence[Sequence[str]]) -> Prepared:
        """Compute and judge the next step; parameters and optimizer stay as they are.

        Raises:
            TrainingError: nothing is trained in it, no gradient arrives, or the watchdog objects.
        """
        total = sum(batch.trained_tokens for batch in batches)
        if total == 0:
            named = ", ".join(source for each in sources for source in each)
            raise TrainingError(f"step {progress.step + 1} has no trained token in any of its examples: {named}")
        scale, scaled_steps = progress.loss_scale, progress.scaled_steps + 1
        losses, norm = self._gradients(progress.step, batches, total, scale)
        while scale > 1 and not math.isfinite(norm) and all(map(math.isfinite, losses)):
            scale, scaled_steps = scale / 2, 0
            losses, norm = self._gradients(progress.step, batches, total, scale)
        if progress.step == 0 and all(map(math.isfinite, losses)):
            self._watchdog.check_gradients_exist()
        if scaled_steps >= SCALE_DOUBLES_AFTER and 1 < scale < LARGEST_SCALE:
            scale, scaled_steps = scale * 2, 0
        share = factor(self._config, progress.step, self._steps)
        report = StepReport(progress.step + 1, sum(losses) / total, losses, sources, norm, self._config.lr * share)
        judged = self._watchdog.check(report, progress)
        after = replace(judged, loss_scale=scale, scaled_steps=scaled_steps if scale > 1 else 0)
        return Prepared(after, report.loss, report.lr, norm)

    def apply(self, prepared: Prepared) -> None:
        """Clip and take the prepared step."""
        if self.budget is not None:
            self.budget.observe()
        limit = self._config.clip_norm
        if limit is not None and prepared.grad_norm > limit:
            torch._foreach_mul_(self._present_gradients(), limit / prepared.grad_norm)
        adamw.set_rate(self.optimizer, factor(self._config, prepared.progress.step, self._steps))
        if self.budget is not None:
            self.budget.regularise()
        with adamw.idle_experts_kept(self._experts):
            self.optimizer.step()
        if self.budget is not None:
            self.budget.prune(prepared.progress.step + 1)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state of the optimizer and of the method, by name; what the adapter's file holds is not in it."""
        kept = {} if self.budget is None else self.budget.state_tensors()
        return {**adamw.state_tensors(self.optimizer, self._named), **kept}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave.

        Raises:
            CheckpointError: a tensor is missing, left over or of another shape.
        """
        own = set() if self.budget is None else set(self.budget.names)
        adamw.load_state(self.optimizer, self._named, {name: one for name, one in tensors.items() if name not in own})
        if self.budget is not None:
            self.budget.load_state(tensors)

    def _gradients(self, step: int, batches: Sequence[Batch], total: int, scale: float) -> tuple[list[float], float]:
        """Loss sum of each micro-batch, and the norm of the gradient of the step's mean."""
        self._model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums: list[Tensor] = []
        for index, batch in enumerate(batches):
            torch.manual_seed(derive(self._seed, step, index))
            if batch.trained_tokens == 0:
                continue
            loss = self._loss_of(batch)
            (loss * (scale / total)).backward()  # type: ignore[no-untyped-call]
            sums.append(loss.detach())
        if scale != 1:
            torch._foreach_mul_(self._present_gradients(), 1 / scale)
        norm = adamw.gradient_norm(self._parameters)
        *losses, grad_norm = torch.stack([*sums, norm.to(sums[0].dtype)]).tolist()
        counted = iter(losses)
        return [next(counted) if batch.trained_tokens else 0.0 for batch in batches], grad_norm

    def _present_gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

