"""Recipes: YAML as people write it, overrides, errors that name the key, and a resolved copy that reads back equal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sideroad.errors import ConfigError
from sideroad.train.recipe import dump_recipe, load_recipe

PLAIN = "base: {model: owner/model}\ndata: {train: owner/rows}\n"

EXAMPLES = Path(__file__).parents[2] / "examples"


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(written(folder, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", ".001", "0.001", "1.0e-3", "+1e-3"])
def test_a_float_is_a_float_however_it_is_written(tmp_path: Path, number: str) -> None:
    assert load_recipe(written(tmp_path, f"{PLAIN}optim: {{lr: {number}}}")).optim.lr == 0.001


@pytest.mark.parametrize("word", ["on", "off"])
def test_on_and_off_are_words(tmp_path: Path, word: str) -> None:
    text = f"base: {{model: a/b}}\ndata: {{train: a/b, packing: {word}}}"
    assert load_recipe(written(tmp_path, text)).data.packing == word


def test_every_default_is_filled_in(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, PLAIN))
    assert (recipe.optim.lr, recipe.optim.batch_size, recipe.train.epochs, recipe.seed) == (1e-3, 8, 1, 0)


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    told = message(tmp_path, "base: {model: a/b}\ndata: {train: a/b}\noptim:\n  lr: 1\n  eps: 1\n  lr: 2\n")
    assert 'line 6: key "lr" is given twice, first in line 4' in told


def test_all_unknown_keys_are_listed_with_the_nearest(tmp_path: Path) -> None:
    told = message(tmp_path, PLAIN + "optim: {learning_rte: 1, warmup_rato: 0.1}\ntrian: {epochs: 2}")
    assert "3 problems" in told
    assert 'unknown key "optim.warmup_rato". Did you mean "warmup_ratio"?' in told
    assert 'unknown key "trian". Did you mean "train"?' in told
    assert str(tmp_path / "recipe.yaml") in told


def test_a_wrong_type_names_key_and_value(tmp_path: Path) -> None:
    told = message(tmp_path, PLAIN + "optim: {batch_size: many}")
    assert "optim.batch_size" in told
    assert "'many'" in told


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("optim: {batch_size: 8, batch_tokens: 512}", "batch_size and batch_tokens exclude each other"),
        ("optim: {batch_size: null}", "batch_size and batch_tokens are both null"),
        ("optim: {warmup_steps: 3, warmup_ratio: 0.1}", "warmup_steps and warmup_ratio exclude each other"),
        ("optim: {decay_ratio: 0.1}", "decay_ratio belongs to schedule wsd, not cosine"),
        ("optim: {schedule: constant, min_lr_ratio: 0.1}", "constant schedule does not fall"),
        (
            "train: {keep: best, early_stopping: 2}",
            "train.keep: best, train.early_stopping cannot work without a valid",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, section: str, told: str) -> None:
    assert told in message(tmp_path, PLAIN + section)


def test_an_alternative_puts_the_default_out_of_force(tmp_path: Path) -> None:
    text = PLAIN + "optim: {batch_tokens: 512, warmup_steps: 3, schedule: wsd}"
    optim = load_recipe(written(tmp_path, text)).optim
    assert (optim.batch_size, optim.warmup_ratio, optim.decay_ratio) == (None, None, 0.2)


def test_overrides_follow_the_same_schema(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN)
    recipe = load_recipe(path, ["optim.lr=1e-4", "adapter.targets=[q_proj, v_proj]", "adapter.method.rank=4"])
    assert recipe.optim.lr == 1e-4
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    assert recipe.adapter.method.rank == 4
    assert 'Did you mean "lr"' in message(tmp_path, PLAIN, "optim.lrr=1")
    assert '--set "optim.lr" is not key=value' in message(tmp_path, PLAIN, "optim.lr")
    assert "with --set optim.lr" in message(tmp_path, PLAIN, "optim.lr=fast")


def test_data_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    train = written(tmp_path / "rows", "{}", "train.jsonl")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    text = "base: {model: a/b}\ndata: {train: [rows/train.jsonl, owner/name], validation: rows/missing.jsonl}"
    path = written(tmp_path, text)
    data = load_recipe(path).data
    assert data.train == (str(train), "owner/name")
    assert data.validation == str(tmp_path / "rows" / "missing.jsonl")
    here = written(elsewhere, "{}", "mine.jsonl")
    assert load_recipe(path, ["data.train=mine.jsonl"]).data.train == str(here)


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    text = (
        'base: {model: a/b}\ndata: {train: a/b, system: "1e-3", packing: "on", validation: "no"}\n'
        "optim: {lr: 1e-5, batch_tokens: 100, schedule: wsd}\n"
    )
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.data.system == "1e-3"
    again = load_recipe(written(tmp_path, dump_recipe(recipe), "resolved.yaml"))
    assert again == recipe


def test_a_missing_recipe_names_its_neighbours(tmp_path: Path) -> None:
    written(tmp_path, PLAIN, "quickstart.yaml")
    with pytest.raises(ConfigError, match=r'does not exist.*Recipes in.*Did you mean "quickstart.yaml"'):
        load_recipe(tmp_path / "quickstrat.yaml")
    with pytest.raises(ConfigError, match="there is no directory"):
        load_recipe(tmp_path / "nowhere" / "quickstart.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "found nothing"),
        ("- a\n- b", "found list"),
        ("base: [", "is not valid YAML"),
        ("base: {model: a/b}\n---\nseed: 1", "is not valid YAML"),
        ("base: !!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in message(tmp_path, text)


def test_a_home_of_nobody_is_a_missing_path_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("base: {model: ~nobody-of-this-name/model}\ndata: {train: ~nobody-of-this-name/x.jsonl}\n")
    assert load_recipe(path).data.train_sources[0].endswith("~nobody-of-this-name/x.jsonl")


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert Path(str(recipe.data.train)).is_file()


def test_a_resolved_recipe_can_change_its_kind(tmp_path: Path) -> None:
    text = dump_recipe(load_recipe(written(tmp_path, PLAIN + "adapter: {method: {rank: 4}}\n")))
    again = load_recipe(written(tmp_path, text, "resolved.yaml"), ["adapter.method.kind=dora"])
    assert (again.adapter.method.kind, again.adapter.method.rank) == ("dora", 4)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("{init: lora_ga}", 'there is no such start; allowed: kaiming, .*, eva, lora-ga. Did you mean "lora-ga"'),
        ("{kind: DoRA}", "there is no kind 'DoRA'; allowed: lora, dora, adalora. Did you mean \"dora\""),
        ("{kind: rslora}", "rslora: it is a scaling: scaling: alpha/sqrt"),
        ("{kind: pissa}", "pissa: it is a start: init: pissa"),
        ("{kind: dora, trains: B}", "trains says which factors of plain LoRA learn; dora trains all it has"),
        (
            "{kind: adalora, target_rank: 99, init: gaussian, warmup: .9}",
            "target_rank 99 .*; warmup 0.9 .*; init: AdaLoRA has",
        ),
        ("{alpha: .inf}", "adapter.method.alpha: .*finite number"),
        ("{init: {kind: eva, rho: .inf}}", "adapter.method.init.rho: .*finite number"),
    ],
)
def test_a_method_that_cannot_be_is_refused_with_the_way_on(tmp_path: Path, method: str, words: str) -> None:
    assert re.search(words, message(tmp_path, f"{PLAIN}adapter: {{method: {method}}}\n"))
