"""Rows of the migration guide about training and about what is not there: M120 to M148."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from migrating import agree, alike, own, three
from mixtures import mixture
from pairs import QV, both, config, fill, logits, quiet, relative, tiny_gpt2
from peft.optimizers import create_lorafa_optimizer as their_lorafa
from peft.optimizers import create_loraplus_optimizer as their_loraplus
from safetensors.torch import load_file
from test_parts import CASES as PARTS
from test_parts import bert, pair, says
from tiny import IDS, tiny_llama
from tiny import fill as core_fill
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from sideroad import Adapter, LoraMethod, attach, errors
from sideroad import peft as door
from sideroad.vocabulary import grow, with_grown_rows

ROWS = [{"input_ids": (torch.arange(8) * 7 + n) % 250, "labels": (torch.arange(8) * 7 + n) % 250} for n in range(8)]


def steps(model: Any, count: int = 3, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """Losses of a few steps on one row."""
    model.train()
    chosen = optimizer or torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        chosen.step()
        chosen.zero_grad()
        losses.append(loss.item())
    return losses


def m120_loop(folder: Path) -> None:
    ours, theirs, handle = three()
    expected = steps(theirs)
    assert steps(ours) == pytest.approx(expected, rel=1e-4)
    assert steps(handle.model) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-2)


def trainer(model: Any, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=2,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=ROWS)


def m121_trainer(folder: Path) -> None:
    ours, theirs, handle = three()
    losses = []
    with quiet():
        for name, model in (("ours", ours), ("theirs", theirs), ("own", handle.model)):
            run = trainer(model, folder / name)
            run.train()
            losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
            if name != "own":
                run.save_model()
                assert not (folder / name / "model.safetensors").exists()
        with pytest.raises(errors.AdapterError, match="adapter tensors into the model's file"):
            run.save_model()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert load_file(folder / "ours/adapter_model.safetensors").keys() == load_file(
        folder / "theirs/adapter_model.safetensors"
    ).keys()


def m122_trl(folder: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tiny import chat_rows, tiny_tokenizer

    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "max_length": 64,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    data, tokenizer = Dataset.from_list(chat_rows(4)), tiny_tokenizer()
    with quiet():
        model = door.get_peft_model(tiny_llama(), config())
        run = trl.SFTTrainer(
            model=model, args=trl.SFTConfig(**settings), train_dataset=data, processing_class=tokenizer
        )
        run.train()
    assert type(run.model) is door.PeftModelForCausalLM


def m123_accelerate(folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    ours, theirs, handle = three()
    losses = []
    for model in (ours, theirs, handle.model):
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        losses.append(steps(prepared, 2, optimizer))
        assert accelerator.unwrap_model(prepared) is model
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


def m124_checkpointing(folder: Path) -> None:
    for reentrant in (False, True):
        ours, theirs, handle = three()
        expected = steps(theirs)
        for model in (ours, handle.model):
            base: Any = model
            base.activation_checkpointing_enable({"use_reentrant": reentrant})
            if model is handle.model:
                base.enable_input_require_grads()
            assert steps(model) == pytest.approx(expected, rel=1e-4)


def m125_few_bits(folder: Path) -> None:
    found = []
    for library in (door, peft):
        base = tiny_llama().bfloat16()
        base.is_loaded_in_4bit = True
        with quiet():
            ready = library.prepare_model_for_kbit_training(base)
        assert ready is base
        found.append({(name, one.dtype, one.requires_grad) for name, one in ready.named_parameters()})
        assert base.is_activation_checkpointing
    assert found[0] == found[1]


def m126_loraplus(folder: Path) -> None:
    ours, theirs, handle = three()
    options: dict[str, Any] = {"lr": 1e-2, "loraplus_lr_ratio": 4}
    expected = steps(theirs, 3, their_loraplus(theirs, torch.optim.SGD, **options))
    assert steps(ours, 3, door.create_loraplus_optimizer(ours, torch.optim.SGD, **options)) == pytest.approx(expected)
    named = handle.parameters("default")
    groups = [
        {"params": [one for name, one in named.items() if name.endswith(part)], "lr": rate}
        for part, rate in ((".A", 1e-2), (".B", 4e-2))
    ]
    assert steps(handle.model, 3, torch.optim.SGD(groups)) == pytest.approx(expected)


def m132_lorafa(folder: Path) -> None:
    ours, theirs, handle = three()
    other = attach(tiny_llama(), own(method=LoraMethod(rank=4, alpha=8, trains="B")))
    other.load("default", handle.adapter("default"))
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lr": 1e-3}
    expected = steps(theirs, 3, their_lorafa(theirs, **options))
    assert steps(ours, 3, door.create_lorafa_optimizer(ours, **options)) == pytest.approx(expected, rel=1e-3)
    own_adam = torch.optim.AdamW(other.parameters("default").values(), lr=1e-3, eps=1e-6, weight_decay=0.0)
    assert steps(other.model, 3, own_adam) == pytest.approx(expected, rel=1e-3)
    kept = door.get_peft_model_state_dict(ours)
    start = handle.adapter("default").weights
    for key, one in kept.items():
        if "lora_A" in key:
            assert torch.equal(one, start[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]["A"])
    dora = door.get_peft_model(tiny_llama(), config(use_dora=True))
    with pytest.raises(errors.AdapterError, match="correction does not hold"):
        door.create_lorafa_optimizer(dora, **options)


def m127_heads(folder: Path) -> None:
    for case in ("classification", "tokens", "answers"):
        ours, theirs = pair(case)
        assert relative(says(ours), says(theirs)) <= 1e-5
        whole = {name.split(".")[2] for name, one in ours.named_parameters() if one.requires_grad and ".copy." in name}
        assert whole == {"answers": {"qa_outputs"}}.get(case, {"classifier"})
    handle = attach(bert()(), own(targets=("query",), modules_to_save=("classifier",)))
    assert "classifier.weight" in handle.parameters("default")


def m128_new_tokens(folder: Path) -> None:
    tiny_llama().save_pretrained(folder / "base")

    def larger() -> Any:
        base = LlamaForCausalLM.from_pretrained(folder / "base").eval()
        torch.manual_seed(6)
        base.resize_token_embeddings(262, mean_resizing=False)
        return base

    ids = torch.tensor([[1, 259, 4, 261]])
    fields: dict[str, Any] = {"trainable_token_indices": [259, 260, 261]}
    ours = door.get_peft_model(larger(), config(**fields))
    fill(ours)
    ours.save_pretrained(folder / "a")
    with quiet():
        theirs = peft.get_peft_model(larger(), peft.LoraConfig(**QV, **fields)).eval()
        peft.set_peft_model_state_dict(theirs, door.get_peft_model_state_dict(ours))
    assert relative(logits(ours, ids), logits(theirs, ids)) <= 1e-5
    published = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    read = door.PeftModel.from_pretrained(published, folder / "a")
    assert relative(logits(read, ids), logits(theirs, ids)) <= 1e-5
    handle = ours.base_model.handle
    value = with_grown_rows(handle.survey(), handle.model, handle.adapter("default"), 259)
    value.save(folder / "own")
    bare = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    assert grow(bare, Adapter.load(folder / "own"))
    attach(bare, Adapter.load(folder / "own"))
    assert relative(logits(bare, ids), logits(theirs, ids)) <= 1e-5


def m129_modes(folder: Path) -> None:
    fields: dict[str, Any] = {**QV, "lora_dropout": 0.5}
    with quiet():
        theirs = peft.get_peft_model(tiny_llama().eval(), peft.LoraConfig(**fields))
    ours = door.get_peft_model(tiny_llama().eval(), door.LoraConfig(**fields))
    handle = attach(tiny_llama().eval(), own())
    assert any(one.training for one in theirs.base_model.modules())
    assert not any(one.training for model in (ours, handle.model) for one in model.modules())


def m130_kinds(folder: Path) -> None:
    for case in ("embedding and convolution", "attention"):
        ours, theirs = pair(case)
        assert relative(says(ours), says(theirs)) <= 1e-5
        make, _ = PARTS[case]
        other = attach(make(), ours.base_model.handle.adapter("default"))
        assert relative(says(other.model), says(theirs)) <= 1e-5
    alike({"target_modules": ["c_attn"]}, {"targets": ("c_attn",)}, tiny_gpt2)


def m131_experts(folder: Path) -> None:
    fields = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ours, theirs = both(lambda: mixture("mixtral"), **fields)
    assert relative(says(ours), says(theirs)) <= 1e-5
    other = attach(mixture("mixtral"), ours.base_model.handle.adapter("default"))
    assert relative(says(other.model), says(theirs)) <= 1e-5
    assert other.adapter("default").config.targets == ("gate_up_proj", "down_proj")
    with pytest.raises(errors.TargetError, match="other parameters belong to layers"):
        door.get_peft_model(mixture("mixtral"), config(target_parameters=["q_proj.weight"]))
    with pytest.warns(UserWarning, match="left out"):
        door.get_peft_model(mixture("mixtral"), config(target_modules="all-linear"))


def m140_other_kinds(folder: Path) -> None:
    for name in ("IA3Config", "PromptTuningConfig"):
        assert hasattr(peft, name)
        with pytest.raises(ImportError, match=f"{name} is not in sideroad.peft"):
            getattr(door, name)
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
        theirs.save_pretrained(folder)
    for load in (
        lambda: door.PeftModel.from_pretrained(tiny_llama(), folder),
        lambda: door.PeftConfig.from_pretrained(folder),
        lambda: Adapter.load(folder),
    ):
        with pytest.raises(errors.AdapterError, match="'IA3'"):
            load()


def m147_adalora(folder: Path) -> None:
    with pytest.raises(ImportError, match=r"AdaLoraConfig is not in sideroad.peft; what does it is AdaloraMethod"):
        _ = door.AdaLoraConfig
    fields: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "init_r": 3, "target_r": 1, "total_step": 9}
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.AdaLoraConfig(**fields)).eval()
        for name, one in theirs.named_parameters():
            if "lora_" in name:
                one.data.normal_(std=0.3)
        theirs.save_pretrained(folder)
    assert relative(logits(theirs), logits(tiny_llama())) > 1e-3
    agree(door.PeftModel.from_pretrained(tiny_llama(), folder), theirs, attach(tiny_llama(), Adapter.load(folder)))


def m148_preparation(folder: Path) -> None:
    for name in ("LoraGAConfig", "preprocess_loraga", "get_eva_state_dict"):
        assert hasattr(peft, name)
        with pytest.raises(ImportError, match=f"{name} is not in sideroad.peft; what does it is"):
            getattr(door, name)
    rows = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    start = LoraMethod(rank=4, alpha=8, init="lora-ga")
    handle = attach(tiny_llama(), own(method=start), batches=[{"input_ids": rows, "labels": rows}])
    core_fill(handle)
    handle.adapter("default").save(folder)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), folder).eval()
    agree(door.PeftModel.from_pretrained(tiny_llama(), folder), theirs, handle)


def m141_mixed(folder: Path) -> None:
    with pytest.raises(errors.ConfigError, match="mixed=True"):
        door.get_peft_model(tiny_llama(), config(), mixed=True)
    with pytest.raises(ImportError, match=r"PeftMixedModel is not in sideroad.peft"):
        _ = door.PeftMixedModel


def m142_weighted(folder: Path) -> None:
    with pytest.raises(errors.ConfigError, match="composition"):
        three()[0].add_weighted_adapter(["default"], [1.0], "c")


def m143_hotswap(folder: Path) -> None:
    ours, theirs, _ = three()
    ours.save_pretrained(folder)
    fill(ours, seed=9)
    with pytest.raises(errors.ConfigError, match="serving"):
        ours.hotswap_adapter(folder, "default")
    pointers = [one.data_ptr() for one in ours.parameters()]
    ours.load_adapter(folder, "default")
    assert [one.data_ptr() for one in ours.parameters()] == pointers
    agree(ours, theirs)


def m144_push(folder: Path) -> None:
    with pytest.raises(errors.ConfigError, match="hf upload"):
        three()[0].push_to_hub("org/name")


def m145_functions(folder: Path) -> None:
    for name in ("convert_to_lora", "save_as_lora", "load_peft_weights", "replace_lora_weights_loftq"):
        assert hasattr(peft, name)
        assert not hasattr(door, name)
    three()[0].save_pretrained(folder)
    expected = peft.load_peft_weights(str(folder), device="cpu")
    assert sum(len(leaves) for leaves in Adapter.load(folder).weights.values()) == len(expected)


class Packed(nn.Linear):
    """A layer whose weight is stored in integers."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


def m146_quantised(folder: Path) -> None:
    for put in (
        lambda: door.get_peft_model(nn.Sequential(Packed()), door.LoraConfig(target_modules=["0"])),
        lambda: attach(nn.Sequential(Packed()), own(targets=("0",))),
    ):
        with pytest.raises(errors.TargetError, match="cannot be adapted"):
            put()
