"""Rows of the migration guide about the configuration: M01 to M25, M41 to M43."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from migrating import agree, alike, own, three
from pairs import QV, bytes_of, config, fill, logits, quiet, relative, same, tiny_gpt2
from test_parts import SHORT, bert, mixed, says
from tiny import tiny_llama
from torch import nn

from sideroad import Adapter, AdapterConfig, LoraMethod, attach, errors
from sideroad import peft as door
from sideroad.config import DoraMethod, EvaInit


def m01_rank(folder: Path) -> None:
    ours, theirs, _ = alike({"r": 3}, {"method": LoraMethod(rank=3, alpha=8)})
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    with pytest.warns(UserWarning, match="rank 33 is larger than q_proj"):
        door.get_peft_model(tiny_llama(), config(r=33))
    with pytest.raises(errors.TargetError, match="rank 33 "):
        attach(tiny_llama(), AdapterConfig(targets="q_proj", method=LoraMethod(rank=33)))
    assert attach(tiny_llama(), AdapterConfig(targets="q_proj", method=LoraMethod(rank=33)), any_rank=True)


def m02_alpha(folder: Path) -> None:
    alike({"lora_alpha": 5}, {"method": LoraMethod(rank=4, alpha=5)})
    assert door.LoraConfig().lora_alpha == peft.LoraConfig().lora_alpha == 8
    assert LoraMethod().alpha == 16


def m03_rslora(folder: Path) -> None:
    alike({"use_rslora": True}, {"method": LoraMethod(rank=4, alpha=8, scaling="alpha/sqrt(r)")})


def m04_dropout(folder: Path) -> None:
    all_three = alike({"lora_dropout": 0.5}, {"method": LoraMethod(rank=4, alpha=8, dropout=0.5)})
    for model in (all_three[0], all_three[1], all_three[2].model):
        model.train()
        assert not torch.equal(logits(model), logits(model))
    with pytest.raises(errors.ConfigError, match="lora_dropout is 1"):
        config(lora_dropout=1.0)


def m05_names(folder: Path) -> None:
    alike({"target_modules": ["q_proj", "mlp.up_proj"]}, {"targets": ("q_proj", "mlp.up_proj")})
    with quiet():
        peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "nope"]))
    for wrong in (
        lambda: door.get_peft_model(tiny_llama(), config(target_modules=["q_proj", "nope"])),
        lambda: attach(tiny_llama(), own(targets=("q_proj", "nope"))),
    ):
        with pytest.raises(errors.TargetError, match='"nope" matches no'):
            wrong()


def m06_expression(folder: Path) -> None:
    alike({"target_modules": r".*\.q_proj"}, {"targets": r"re:.*\.q_proj"})
    alike({"target_modules": r".*\.q_proj"}, {"targets": "*.q_proj"})
    with pytest.raises(errors.TargetError, match=r"for names give \['q_proj'\]"):
        door.get_peft_model(tiny_llama(), config(target_modules="q_proj"))


def m07_all_linear(folder: Path) -> None:
    alike({"target_modules": "all-linear"}, {"targets": "all-linear"})


def m08_default(folder: Path) -> None:
    alike({"target_modules": None})
    assert AdapterConfig().targets == "all-linear"
    base = tiny_llama()
    base.config.model_type = "never heard of"
    assert door.get_peft_model(base, config(target_modules=None)).peft_config["default"].target_modules == {
        "q_proj", "v_proj",
    }  # fmt: skip


def m09_exclude(folder: Path) -> None:
    alike({"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
          {"targets": "all-linear", "exclude": ("down_proj",)})  # fmt: skip
    with pytest.raises(errors.TargetError, match='exclude_modules: "nope"'):
        door.get_peft_model(tiny_llama(), config(exclude_modules=["nope"]))


def m10_layers(folder: Path) -> None:
    alike({"layers_to_transform": [1], "layers_pattern": "layers"}, {"layers": (1,), "layers_pattern": "layers"})
    alike({"layers_to_transform": 1}, {"layers": "1-"})


def m11_ranks(folder: Path) -> None:
    alike({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}})
    with pytest.raises(errors.TargetError, match='rank_pattern: "k_proj" matches none'):
        door.get_peft_model(tiny_llama(), config(rank_pattern={"k_proj": 2}))


def m12_alphas(folder: Path) -> None:
    alike({"alpha_pattern": {"q_proj": 3}}, {"alpha_pattern": {"q_proj": 3}})


def m13_biases(folder: Path) -> None:
    for theirs_word, our_word in (("all", "all"), ("lora_only", "adapted")):
        fields: dict[str, Any] = {"target_modules": ["c_attn"], "bias": theirs_word}
        ours, theirs, handle = alike(fields, {"targets": ("c_attn",), "bias": our_word}, tiny_gpt2)
        base = logits(tiny_gpt2())
        with ours.disable_adapter(), handle.disabled(), quiet(), theirs.disable_adapter():
            assert torch.equal(logits(ours), base)
            assert torch.equal(logits(handle.model), base)
            assert relative(logits(theirs), base) > 1e-3
        ours.add_adapter("b", config(**fields))
        with pytest.raises(ValueError, match="bias"), quiet():
            theirs.add_adapter("b", peft.LoraConfig(**fields))
        with pytest.raises(errors.TargetError, match="bias"):
            door.get_peft_model(tiny_llama(), config(bias=theirs_word))


def m14_starts(folder: Path) -> None:
    for theirs_word, our_word in ((True, "kaiming"), ("gaussian", "gaussian"), (False, "random")):
        fields: dict[str, Any] = {"init_lora_weights": theirs_word, "r": 16, "target_modules": "all-linear"}
        with quiet():
            theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields))
        ours = door.get_peft_model(tiny_llama(), door.LoraConfig(**fields))
        handle = attach(tiny_llama(), own(targets="all-linear", method=LoraMethod(rank=16, alpha=8, init=our_word)))
        drawn = [
            {n: p.detach() for n, p in theirs.named_parameters() if "lora_" in n},
            door.get_peft_model_state_dict(ours),
            handle.parameters("default"),
        ]
        for part in ("A", "B"):
            spreads = [
                torch.cat([p.detach().flatten() for n, p in one.items() if n.endswith(f".{part}") or f"_{part}." in n])
                for one in drawn
            ]
            assert all(math.isclose(one.std(), spreads[0].std(), rel_tol=0.05) for one in spreads[1:]), theirs_word
            assert (spreads[0].std() == 0) == (part == "B" and theirs_word is not False)
    seeded = [attach(tiny_llama(), own(), seed=1).model for _ in range(2)]
    assert same(bytes_of(seeded[0]), bytes_of(seeded[1]))


def m25_dora(folder: Path) -> None:
    ours, theirs, _ = alike({"use_dora": True}, {"method": DoraMethod(rank=4, alpha=8)})
    agree(ours.merge_and_unload(), theirs)
    assert torch.equal(logits(door.get_peft_model(tiny_llama(), config(use_dora=True))), logits(tiny_llama()))
    again = door.get_peft_model(tiny_llama(), config(use_dora=True))
    again.add_adapter("b", config(use_dora=True))
    with pytest.raises(errors.AdapterError, match="both DoRA adapters"):
        again.set_adapter(["default", "b"])
    for target, make in (("embed_tokens", tiny_llama), ("attn", mixed)):
        with pytest.raises(errors.TargetError, match=rf"{target} is an? .*DoRA"):
            door.get_peft_model(make(), door.LoraConfig(target_modules=[target], use_dora=True))


def m42_starts_from_the_weight(folder: Path) -> None:
    for word, our_word in (("pissa", "pissa"), ("pissa_niter_16", "pissa-fast"), ("olora", "olora")):
        with quiet():
            theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**QV, init_lora_weights=word)).eval()
        ours = door.get_peft_model(tiny_llama(), config(init_lora_weights=word))
        handle = attach(tiny_llama(), own(method=LoraMethod(rank=4, alpha=8, init=our_word)))
        path = "model.layers.1.self_attn.v_proj"
        layer = theirs.get_submodule(f"base_model.model.{path}")
        base = tiny_llama().get_submodule(path).weight
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for delta in (ours.base_model.handle.deltas("default")[path], handle.deltas("default")[path]):
            if word == "pissa_niter_16":
                # PEFT's randomised SVD takes no direction more than it keeps, so its last ones are rough
                left, theirs_left = (float((base - 2 * one).norm()) for one in (delta.B @ delta.A, product))
                assert left <= theirs_left * (1 + 1e-6)
                assert theirs_left <= 1.02 * left
            else:
                torch.testing.assert_close(delta.B @ delta.A, product, rtol=1e-3, atol=1e-5)
        assert torch.equal(ours.get_base_model().get_submodule(path).weight, base)
        assert relative(layer.base_layer.weight, base) > 1e-2
        fill(ours)
        ours.save_pretrained(folder / word)
        with quiet():
            agree(ours, peft.PeftModel.from_pretrained(tiny_llama(), folder / word).eval())
        again = door.PeftModel.from_pretrained(tiny_llama(), folder / word, is_trainable=True)
        assert again.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()


def m43_eva(folder: Path) -> None:
    rows = torch.randint(3, 250, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": one, "labels": one} for one in rows]
    fields: dict[str, Any] = {**QV, "init_lora_weights": "eva", "lora_alpha": 8}
    ours = door.get_peft_model(tiny_llama(), door.LoraConfig(**fields, eva_config=door.EvaConfig(rho=2.0)))
    door.initialize_lora_eva_weights(ours, batches, show_progress_bar=False)
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields, eva_config=peft.EvaConfig(rho=2.0)))
        peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    method = LoraMethod(rank=4, alpha=8, init=EvaInit(rho=2.0))
    handle = attach(tiny_llama(), own(method=method), batches=batches)
    mine = ours.base_model.handle.adapter("default")
    assert mine.ranks == handle.adapter("default").ranks
    for path, leaves in mine.weights.items():
        torch.testing.assert_close(leaves["A"], handle.adapter("default").weights[path]["A"])
    total = sum(one.shape[0] for name, one in peft.get_peft_model_state_dict(theirs).items() if "lora_A" in name)
    assert sum(mine.ranks.values()) == total == 16
    for wrong in ({"whiten": True}, {"adjust_scaling_factors": False}):
        with pytest.raises(errors.ConfigError, match=f"eva_config.{next(iter(wrong))} is"):
            door.EvaConfig(**wrong)


def m15_fan(folder: Path) -> None:
    for flag in (False, True):
        alike({"target_modules": ["c_attn"], "fan_in_fan_out": flag}, {"targets": ("c_attn",)}, tiny_gpt2)


def m16_whole(folder: Path) -> None:
    ours, _, _ = alike({"modules_to_save": ["lm_head"]}, {"modules_to_save": ("lm_head",)})
    with pytest.raises(errors.TargetError, match='modules_to_save "nothing" matches no module'):
        door.get_peft_model(tiny_llama(), config(modules_to_save=["nothing"]))
    ours.add_adapter("b", config(modules_to_save=["lm_head"]))
    with pytest.raises(errors.AdapterError, match="only one of them can act at a time"):
        ours.set_adapter(["default", "b"])


def m17_tokens(folder: Path) -> None:
    for tied in (False, True):
        alike(
            {"trainable_token_indices": [3, 6]}, {"trainable_tokens": {"embed_tokens": (3, 6)}},
            lambda tied=tied: tiny_llama(tie_word_embeddings=tied),  # type: ignore[misc]
        )  # fmt: skip


def m41_tied(folder: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    mine: dict[str, Any] = {"targets": ("q_proj", "embed_tokens"), "tie_embeddings": True}
    ours, _, handle = alike(fields, mine, lambda: tiny_llama(tie_word_embeddings=True))
    for plain in (ours.merge_and_unload(), handle.merge_and_unload()):
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
    with pytest.raises(errors.TargetError, match="ensure_weight_tying"):
        door.get_peft_model(tiny_llama(), config(**fields))
    with quiet():
        peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields))


def m18_task(folder: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    ours = door.get_peft_model(bert()(), door.LoraConfig(**fields))
    with quiet():
        theirs = peft.get_peft_model(bert()(), peft.LoraConfig(**fields)).eval()
        peft.set_peft_model_state_dict(theirs, door.get_peft_model_state_dict(ours))
    handle = attach(bert()(), own(targets=("query",), modules_to_save=("classifier",)))
    handle.load("default", ours.base_model.handle.adapter("default"))
    assert type(ours).__name__ == type(theirs).__name__ == "PeftModelForSequenceClassification"
    assert relative(says(ours), says(theirs)) <= 1e-5
    assert relative(says(handle.model), says(theirs)) <= 1e-5
    assert ours(SHORT, labels=torch.tensor([1])).loss.requires_grad


def m19_frozen(folder: Path) -> None:
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**QV, inference_mode=True))
    ours = door.get_peft_model(tiny_llama(), config(inference_mode=True))
    handle = attach(tiny_llama(), own(), trainable=False)
    assert not any(one.requires_grad for model in (theirs, ours, handle.model) for one in model.parameters())


def m20_base(folder: Path) -> None:
    said = {"base_model_name_or_path": "org/base", "revision": "v1"}
    for wanted in ({}, said):
        ours, theirs, _ = three(wanted, make=lambda: named("org/model"))
        for name, model in (("ours", ours), ("theirs", theirs)):
            with quiet():
                model.save_pretrained(folder / name)
        read = {name: peft.LoraConfig.from_pretrained(folder / name) for name in ("ours", "theirs")}
        assert read["theirs"].base_model_name_or_path == "org/model"
        assert read["ours"].base_model_name_or_path == ("org/base" if wanted else "org/model")
        assert read["ours"].revision == read["theirs"].revision == wanted.get("revision")
        base = Adapter.load(folder / "ours").base
        assert base is not None
        assert base.name == read["ours"].base_model_name_or_path


def named(name: str) -> nn.Module:
    model = tiny_llama()
    model.name_or_path = name
    return model


def m21_slip(folder: Path) -> None:
    with pytest.raises(TypeError):
        peft.LoraConfig(target_module=["q_proj"])
    with pytest.raises(errors.ConfigError, match='Did you mean "target_modules"'):
        door.LoraConfig(target_module=["q_proj"])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="target_modules"):
        AdapterConfig(target_modules=["q_proj"])  # type: ignore[call-arg]
    with pytest.raises(errors.ConfigError, match="2 problems"):
        door.LoraConfig(r=0, lora_dropout=2)


def m22_unmatched(folder: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "nope"]}
    ours = door.get_peft_model(tiny_llama(), config(**fields, allow_unmatched=True))
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields))
    handle = attach(tiny_llama(), own(targets=("q_proj", "v_proj", "nope"), allow_unmatched=True))
    found = theirs.base_model.targeted_module_names
    assert ours.targeted_module_names == list(handle.paths("default")) == found


def m23_files(folder: Path) -> None:
    config(r=3).save_pretrained(folder)
    assert peft.LoraConfig.from_pretrained(folder).r == door.LoraConfig.from_pretrained(folder).r == 3
    assert config(r=3).to_dict()["r"] == peft.LoraConfig(r=3).to_dict()["r"]
    ours, _, _ = three({"r": 3}, {"method": LoraMethod(rank=3, alpha=8)})
    ours.save_pretrained(folder)
    assert Adapter.load(folder).config.method.rank == 3


def m24_plain_fields(folder: Path) -> None:
    fields = {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"]}
    made = door.get_peft_config(fields)
    assert isinstance(made, door.LoraConfig)
    assert made.r == peft.PeftConfig.from_peft_type(**fields).r == 3
