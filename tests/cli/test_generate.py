"""`sideroad generate`: one prompt, from the command line or stdin, by a base or an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from terminal import call
from tiny import tiny_model_dir


def answer(*arguments: str | Path, stdin: str | None = None) -> dict[str, Any]:
    spoken = call("generate", *arguments, "--max-new-tokens", "6", "--json", stdin=stdin)
    assert spoken.code == 0, spoken.err
    found: dict[str, Any] = json.loads(spoken.out)
    return found


def test_run_prompt_and_stdin_agree(run: Path) -> None:
    said = answer(run, "light in room 3")
    assert said["new_tokens"] == 6
    assert said["ended"] == "length"
    assert answer(run, stdin="light in room 3\n")["answer"] == said["answer"]
    assert answer("--adapter", run / "adapter", "light in room 3")["answer"] == said["answer"]
    plain = call("generate", run, "light in room 3", "--max-new-tokens", "6")
    assert plain.out == f"{said['answer']}\n"


def test_base_alone_differs_from_the_adapter(run: Path, place: Path) -> None:
    alone = answer("--base", place / "tiny-llama", "light in room 3")
    assert alone["adapter"] is None
    assert answer(run, "light in room 3")["answer"] != alone["answer"]


def test_the_prompt_is_written_as_in_training(place: Path, run: Path, tmp_path: Path) -> None:
    bare = answer(run, "hi")["prompt_tokens"]
    assert answer(run, "hi", "--system", "be")["prompt_tokens"] == bare + 2 + len("system\nbe\n")
    changes = ("--set", "data.system=be", "--set", "train.max_steps=1")
    spoken = call("train", place / "task.yaml", "--run", tmp_path / "run", *changes)
    assert spoken.code == 0, spoken.err
    assert answer(tmp_path / "run", "hi")["prompt_tokens"] == answer(run, "hi", "--system", "be")["prompt_tokens"]


def test_seed_decides_sampled_answers(run: Path) -> None:
    options = ("light", "--temperature", "2.0")
    assert answer(run, *options, "--seed", "1")["answer"] == answer(run, *options, "--seed", "1")["answer"]
    assert answer(run, *options, "--seed", "1")["answer"] != answer(run, *options, "--seed", "2")["answer"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["{run}", "one", "two"], None, "one prompt at a time; found 2"),
        ([], None, "give a run or adapter directory, or --base MODEL"),
        (["{run}"], " \n", "the prompt is empty"),
        (["{run}", "hi", "--device", "tpu"], None, "a device is auto, cpu, mps, cuda"),
    ],
)
def test_usage(run: Path, arguments: list[str], stdin: str | None, words: str) -> None:
    spoken = call("generate", *(argument.format(run=run) for argument in arguments), stdin=stdin)
    assert spoken.code == 2, spoken.err
    assert words in spoken.err


def test_an_adapter_for_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    recipe = (run / "recipe.yaml").read_text()
    other = tiny_model_dir(tmp_path, seed=1)
    lines = [f"  model: {other}" if line.startswith("  model:") else line for line in recipe.splitlines()]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n")
    spoken = call("generate", tmp_path, "hi")
    assert spoken.code == 5
    assert "was made for tiny-llama" in spoken.err
    assert "--base MODEL" in spoken.err


def test_too_long_for_the_model(run: Path) -> None:
    spoken = call("generate", run, "x" * 600)
    assert spoken.code == 4
    assert "512 positions" in spoken.err


def test_unfinished_run_says_how_to_finish(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base: {model: x}\n")
    spoken = call("generate", tmp_path, "hi")
    assert spoken.code == 5
    assert f"--run {tmp_path} --resume" in spoken.err


def test_a_long_prompt_is_no_directory(place: Path) -> None:
    spoken = call("generate", "--base", place / "tiny-llama", "--max-new-tokens", "1", "word " * 90)
    assert spoken.code == 0, spoken.err
    spoken = call("generate", "word " * 90, "hi")
    assert spoken.code == 5
    assert "no run or adapter at" in spoken.err


@pytest.mark.parametrize("words", [("",), ("  ",)])
def test_an_empty_prompt_is_refused(run: Path, words: tuple[str]) -> None:
    spoken = call("generate", run, *words)
    assert spoken.code == 2
    assert "the prompt is empty" in spoken.err


def test_bytes_that_are_no_text_are_refused(run: Path) -> None:
    for verb in ("generate", "chat"):
        spoken = call(verb, run, stdin=b"a \xff b\n")
        assert "the text is not Unicode: half of a character, '\\udcff'" in spoken.err, spoken.err
        assert spoken.code == 3


def test_the_chat_template_of_training_goes_with_the_adapter(place: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    changes = ("--set", f"data.chat_template={tmp_path / 'own.jinja'}", "--set", "train.max_steps=1")
    assert call("train", place / "task.yaml", "--run", tmp_path / "run", *changes).code == 0
    (tmp_path / "own.jinja").unlink()
    wanted = len("[user]hi") + 1 + len("[assistant]")
    assert answer(tmp_path / "run", "hi")["prompt_tokens"] == wanted
    assert call("evaluate", tmp_path / "run").code == 0
    assert call("merge", tmp_path / "run", "--out", tmp_path / "merged").code == 0
    assert answer("--base", tmp_path / "merged", "hi")["prompt_tokens"] == wanted


def test_a_merged_model_is_prompted_as_in_training(place: Path, tmp_path: Path) -> None:
    changes = ("--set", "data.system=be", "--set", "train.max_steps=1")
    assert call("train", place / "task.yaml", "--run", tmp_path / "run", *changes).code == 0
    assert call("merge", tmp_path / "run", "--out", tmp_path / "merged").code == 0
    alone, merged = answer(tmp_path / "run", "hi"), answer("--base", tmp_path / "merged", "hi")
    assert alone["prompt_tokens"] == merged["prompt_tokens"]
