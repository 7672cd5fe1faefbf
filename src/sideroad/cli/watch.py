"""A training run's events as lines for a person."""

from __future__ import annotations

from sideroad.base.progress import Progress
from sideroad.cli import render
from sideroad.cli.progress import Bar, Pace, evaluating, loading
from sideroad.train import events


class Watch:
    """Receives every event of a run and shows it on the bar; give the object itself as `on_event`."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar
        self.planned: events.Planned | None = None
        self.last_step: int | None = None
        self.result: events.Result | None = None
        self._pace = Pace()
        self._load = loading(bar)

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case Progress():
                self._load(event)
            case events.Planned():
                self._plan(event)
            case events.StepDone():
                self._step(event)
            case events.Evaluating(who=who, examples=examples, answered=answered, asked=asked):
                evaluating(self.bar, who, examples, answered, asked)
            case events.Finished(result=result):
                self.bar.close()
                self.result = result
            case _:
                self._line(event)

    def _line(self, event: events.Event) -> None:
        match event:
            case events.Note(text=text):
                self.bar.say(f"note: {text}")
            case events.Validated(step=step, loss=loss, best=best):
                self.bar.say(f"step {step}  validation loss {loss:.4f}{'  best so far' if best else ''}")
            case events.StoppedEarly(step=step, best_step=best_step, patience=patience):
                self.bar.close()
                self.bar.say(
                    f"step {step}  stopped early: no better validation loss in {patience} validations "
                    f"since step {best_step}"
                )
            case _:
                pass

    def _plan(self, plan: events.Planned) -> None:
        self.bar.close()
        self.planned = plan
        repeated = f", {plan.epochs} epochs" if plan.epochs > 1 else ""
        rows = "packed in isolation" if plan.packed else "padded, grouped by length"
        saved = render.share(plan.saved_tokens, plan.tokens) if plan.saved_tokens else ""
        resumed = f", continuing after step {plan.start}" if plan.start else ""
        lines = (
            f"adapter     {render.count(plan.trainable_parameters)} trainable parameters",
            f"data        {plan.examples} examples ({plan.validation_examples} for validation){repeated}; "
            f"{render.count(plan.trained_tokens)} of {render.count(plan.tokens)} tokens trained "
            f"({render.share(plan.trained_tokens, plan.tokens)}), {rows}",
            *([f"shared      {saved} of the tokens are repeated beginnings, computed once"] if saved else []),
            f"work        {plan.steps} steps on {plan.device} in {plan.dtype}{resumed}",
        )
        for line in lines:
            self.bar.say(line)

    def _step(self, step: events.StepDone) -> None:
        total = self.planned.steps if self.planned else step.step
        self.last_step = step.step
        self._pace.add(step.seconds, step.trained_tokens)
        rate = render.count(round(self._pace.tokens_per_second))
        text = (
            f"{step.step}/{total}  loss {step.loss:.4f}  {rate} trained tok/s  "
            f"ETA {render.duration(self._pace.remaining(total - step.step))}  {render.size(step.peak_bytes)}"
        )
        self.bar.show("training", step.step, total, text)
        if step.step >= total:
            self.bar.close()
