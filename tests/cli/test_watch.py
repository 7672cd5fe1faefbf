"""The progress of a run, live and in plain lines."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from sideroad.base.progress import Progress
from sideroad.cli.progress import Bar, loading
from sideroad.cli.watch import Watch
from sideroad.train import events


def plan(steps: int = 100) -> events.Planned:
    return events.Planned(
        steps=steps, start=0, epochs=2, examples=50, validation_examples=5, tokens=1000, trained_tokens=250,
        saved_tokens=0,
        packed=True, trainable_parameters=4_880_000, device="cpu", dtype="float32",
    )  # fmt: skip


def step(number: int) -> events.StepDone:
    return events.StepDone(
        step=number, loss=1.23456, lr=1e-3, grad_norm=1.0, trained_tokens=100, real_tokens=200,
        computed_tokens=220, seconds=0.5, peak_bytes=1_500_000_000,
    )  # fmt: skip


def plain_bar(times: list[float]) -> tuple[Bar, io.StringIO]:
    out = io.StringIO()
    return Bar(Console(file=out, width=160), every_seconds=10, clock=lambda: times[0]), out


def test_plain_lines_come_at_intervals_and_at_the_end() -> None:
    times = [0.0]
    bar, out = plain_bar(times)
    watch = Watch(bar)
    watch(plan(steps=6))
    for number in range(1, 7):
        watch(step(number))
        times[0] += 4
    shown = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("training")]
    assert shown == ["1/6", "4/6", "6/6"]
    assert "loss 1.2346  200 trained tok/s  ETA 2 s  1.50 GB" in out.getvalue()


def test_the_plan_the_validations_and_the_notes_stay() -> None:
    bar, out = plain_bar([0.0])
    watch = Watch(bar)
    watch(events.Note("[bold] is not markup"))
    watch(plan())
    watch(events.Validated(step=25, loss=0.5, best=True, seconds=1.0))
    watch(events.Checkpointed(step=25, path=Path("x")))
    watch(events.StoppedEarly(step=50, best_step=25, patience=3))
    watch(events.Evaluating(who="adapted", examples=5))
    text = out.getvalue()
    assert "note: [bold] is not markup" in text
    assert "4.88 M trainable parameters" in text
    assert "50 examples (5 for validation), 2 epochs; 250 of 1,000 tokens trained (25 %), packed in isolation" in text
    assert "step 25  validation loss 0.5000  best so far" in text
    assert "stopped early: no better validation loss in 3 validations since step 25" in text
    assert "evaluating the adapted model  loss over 5 examples" in text


def test_loading_and_scoring_show_how_far_they_are() -> None:
    times = [0.0]
    bar, out = plain_bar(times)
    watch = Watch(bar)
    watch(Progress("convert", "tiny"))
    watch(Progress("load", "tiny"))
    watch(events.Evaluating(who="base", examples=4))
    for answered in (1, 2, 3, 4):
        watch(events.Evaluating(who="base", examples=4, answered=answered, asked=4))
        times[0] += 6
    said = out.getvalue().splitlines()
    assert said[:2] == ["converting tiny", "loading tiny"]
    steps = ("loss over 4 examples", "3/4 answers", "4/4 answers")
    assert said[2:] == [f"evaluating the base model  {far}" for far in steps]


def test_a_terminal_gets_one_live_line_and_the_lasting_ones_above_it() -> None:
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=True, width=120)) as bar:
        watch = Watch(bar)
        watch(plan())
        watch(step(1))
        watch(events.Validated(step=1, loss=0.5, best=False, seconds=1.0))
        watch(step(2))
    text = out.getvalue()
    assert "2/100" in text
    assert "\x1b[2K" in text
    assert "validation loss 0.5000" in text


def test_downloads_show_how_far_they_are() -> None:
    bar, out = plain_bar([0.0])
    report = loading(bar)
    report(Progress("download", "tiny", 500_000, 2_000_000))
    report(Progress("convert", "tiny"))
    assert "downloading tiny  500.0 kB of 2.00 MB (25 %)" in out.getvalue()
    assert "converting tiny" in out.getvalue()
