"""`sideroad targets`: counts from the configuration alone, choices, and near misses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mixtures import mixture
from terminal import call
from tiny import tiny_model_dir, tiny_tokenizer


def test_table_and_totals(place: Path) -> None:
    spoken = call("targets", place / "tiny-llama", "--targets", "q_proj,v_proj", "--rank", "4")
    assert spoken.code == 0, spoken.err
    lines = [line.split() for line in spoken.out.splitlines()]
    assert ["q_proj", "2", "32", "x", "32", "4", "16", "512"] in lines
    assert ["v_proj", "2", "16", "x", "32", "4", "16", "384"] in lines
    assert "4 layers, 896 trainable parameters: 2.48 % of 36,064, base and adapter" in spoken.out
    assert "3.6 kB in float32, 1.8 kB in bfloat16" in spoken.out.replace("3.58", "3.6").replace("1.79", "1.8")


def test_named_models_need_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDEROAD_CACHE", str(tmp_path / "cache"))
    shown = json.loads(call("targets", "smollm2-135m-instruct", "--offline", "--json").out)
    assert shown["base_parameters"] == 134_515_008
    assert shown["trainable_parameters"] == 2_442_240
    assert len(shown["paths"]) == 30 * 7
    assert not (tmp_path / "cache").exists()


def test_recipe_layers_exclude_and_set(place: Path) -> None:
    spoken = call(
        "targets", "--recipe", place / "task.yaml", "--layers", "1", "--exclude", "*.mlp.*",
        "--set", "adapter.rank_pattern={q_proj: 2}", "--json",
    )  # fmt: skip
    shown = json.loads(spoken.out)
    assert {group["name"]: (group["layers"], group["rank"]) for group in shown["groups"]} == {
        "q_proj": (1, 2), "k_proj": (1, 4), "v_proj": (1, 4), "o_proj": (1, 4),
    }  # fmt: skip
    assert all(".1." in entry["path"] for entry in shown["paths"])


def test_all_lists_every_path(place: Path) -> None:
    spoken = call("targets", place / "tiny-llama", "--all")
    assert "model.layers.1.mlp.down_proj  rank 8" in spoken.out


def test_a_regular_expression_keeps_its_commas(place: Path) -> None:
    shown = json.loads(call("targets", place / "tiny-llama", "--targets", r"re:.*\.q_pro{1,2}j", "--json").out)
    assert [group["name"] for group in shown["groups"]] == ["q_proj"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--targets", "q_projj"], 5, 'Did you mean "q_proj"?'),
        (["--rank", "0"], 2, "adapter.method.rank"),
        (["--rank", "64"], 5, "rank 64 is larger than"),
        (["--set", "optim.lr=1"], 2, "adapter.…"),
        (["--set", "adapter.bais=all"], 2, 'Did you mean "bias"?'),
        (["--layers", "7"], 5, "has blocks 0-1 only"),
        (["--rank", "9", "--set", "adapter.method.init=lora-ga"], 5, "its rank can be 8 at most, found 9"),
        (
            ["--targets", "embed_tokens", "--set", "adapter.method.kind=dora"],
            5,
            "model.embed_tokens is an embedding",
        ),
    ],
)
def test_wrong_choices(place: Path, arguments: list[str], code: int, words: str) -> None:
    spoken = call("targets", place / "tiny-llama", *arguments)
    assert spoken.code == code
    assert words in spoken.err


def test_either_a_model_or_a_recipe(place: Path) -> None:
    for arguments in ([], [str(place / "tiny-llama"), "--recipe", str(place / "task.yaml")]):
        spoken = call("targets", *arguments)
        assert spoken.code == 2
        assert "either a MODEL or --recipe" in spoken.err


def test_a_recipe_with_another_base(place: Path, tmp_path: Path) -> None:
    tiny_model_dir(tmp_path, num_hidden_layers=3)
    other = f"base.model={tmp_path / 'tiny-llama'}"
    spoken = call("targets", "--recipe", place / "task.yaml", "--set", other, "--rank", "2", "--json")
    assert spoken.code == 0, spoken.err
    shown = json.loads(spoken.out)
    assert shown["model"] == str(tmp_path / "tiny-llama")
    assert len(shown["paths"]) == 3 * 7
    spoken = call("targets", "--recipe", place / "task.yaml", "--set", "base.modle=x")
    assert spoken.code == 2
    assert 'Did you mean "model"?' in spoken.err


# q_proj and v_proj of two blocks: 32 + 32 and 32 + 16 values for each rank
@pytest.mark.parametrize(
    ("method", "trained", "stored", "size", "words"),
    [
        ("{rank: 4}", 896, 896, 3584, "3.58 kB in float32, 1.79 kB in bfloat16\n"),
        ("{kind: dora, rank: 4}", 992, 992, 3968, "3.97 kB in float32, 2.18 kB in bfloat16\n"),
        ("{trains: B, rank: 4}", 384, 896, 3584, "1.79 kB in bfloat16 (896 values)"),
        ("{init: pissa, rank: 4}", 896, 1792, 7168, "3.58 kB in bfloat16 (1,792 values)"),
        ("{init: lora-ga, rank: 4}", 896, 1792, 7168, "3.58 kB in bfloat16 (1,792 values)"),
        (
            "{kind: adalora, rank: 4, target_rank: 3}",
            912, 672, 2688, "AdaLoRA deals ranks while it trains, 3 of 4 to a layer on average",
        ),
        ("{init: eva, rank: 4}", 896, 896, 3584, "init: eva deals ranks when training starts"),
    ],
)  # fmt: skip
def test_counts_and_sizes_go_by_the_method(
    place: Path, method: str, trained: int, stored: int, size: int, words: str
) -> None:
    arguments = ("targets", place / "tiny-llama", "--targets", "q_proj,v_proj", "--set", f"adapter.method={method}")
    shown = json.loads(call(*arguments, "--json").out)
    assert (shown["trainable_parameters"], shown["stored_parameters"]) == (trained, stored)
    assert sum(group["parameters"] for group in shown["groups"]) == trained
    assert sum(group["stored"] for group in shown["groups"]) == stored
    assert shown["file_bytes"]["float32"] == size
    spoken = call(*arguments)
    assert f"{trained:,} trainable parameters" in spoken.out
    assert words in spoken.out, spoken.out


def test_experts_are_counted_one_by_one(tmp_path: Path) -> None:
    mixture("qwen2_moe").save_pretrained(tmp_path / "mixture")
    tiny_tokenizer().save_pretrained(tmp_path / "mixture")
    spoken = call("targets", tmp_path / "mixture", "--rank", "2")
    assert spoken.code == 0, spoken.err
    lines = [line.split() for line in spoken.out.splitlines()]
    assert ["experts.gate_up_proj", "2", "4", "x", "48", "x", "16", "2", "16", f"{2 * 2 * 4 * (48 + 16):,}"] in lines
    assert "all-linear covers the fused experts" in spoken.out
    assert "all-linear leaves routers frozen" in spoken.out
    shown = json.loads(call("targets", tmp_path / "mixture", "--rank", "2", "--json").out)
    assert {group["name"]: group["experts"] for group in shown["groups"]}["experts.down_proj"] == 4
    assert len(shown["notes"]) == 2
