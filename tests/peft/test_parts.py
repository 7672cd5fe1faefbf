"""What is trained beside pairs on linear layers: whole modules, token rows, embeddings, convolutions, attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import bytes_of, config, fill, logits, quiet, relative, same
from safetensors.torch import load_file
from tiny import IDS, tiny_llama
from torch import Tensor, nn
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from sideroad.errors import AdapterError, TargetError
from sideroad.peft import (
    LoraConfig,
    PeftModel,
    PeftModelForSequenceClassification,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)


class Mixed(nn.Module):
    """An embedding, a convolution and an attention, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Any:
        x = self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        y = self.out(self.attn(x, x, x, need_weights=False)[0])
        return type("Output", (), {"logits": y})()


def mixed() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixed().eval()


def bert(kind: Any = BertForSequenceClassification) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            labels = 2 if kind is BertForQuestionAnswering else 9
            made: nn.Module = kind(BertConfig(vocab_size=50, num_labels=labels, **shape))
        return made.eval()

    return make


SHORT = torch.arange(6)[None] + 3


def says(model: Any) -> Tensor:
    """What a model of any kind of this file says about a short row."""
    with torch.no_grad(), quiet():
        found = model(SHORT)
    names = [name for name in ("logits", "start_logits", "end_logits") if hasattr(found, name)]
    return torch.cat([getattr(found, name).flatten() for name in names])


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "head whole": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "norm, embedding": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]}),
    "rows by list": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 4]}),
    "rows by name": (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 9]}}),
    "rows of a tied embedding": (
        lambda: tiny_llama(tie_word_embeddings=True), {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding and convolution": (mixed, {"target_modules": ["emb", "conv", "out"]}),
    "attention": (mixed, {"target_modules": ["attn", "out"], "lora_alpha": 3}),
    "attention's rank": (
        mixed, {"target_modules": ["attn"], "rank_pattern": {"attn": 2}, "alpha_pattern": {"attn": 3}},
    ),
    "classification": (bert(), {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "tokens": (bert(BertForTokenClassification), {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    "answers": (bert(BertForQuestionAnswering), {"task_type": "QUESTION_ANS"}),
}  # fmt: skip


def pair(case: str) -> tuple[PeftModel, Any]:
    """Ours and PEFT's with the same tensors."""
    make, fields = CASES[case]
    ours = get_peft_model(make(), LoraConfig(r=4, **copy.deepcopy(fields)))
    fill(ours)
    with quiet():
        theirs = peft.get_peft_model(make(), peft.LoraConfig(r=4, **copy.deepcopy(fields)))
        result = peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    assert not result.unexpected_keys
    return ours, theirs.eval()


@pytest.mark.parametrize("case", CASES)
def test_40_and_41_the_same_as_peft_in_memory_and_in_files(case: str, tmp_path: Path) -> None:
    make, _ = CASES[case]
    ours, theirs = pair(case)
    plain = says(ours)
    assert relative(plain, says(make())) > 1e-3
    assert relative(plain, says(theirs)) <= 1e-5
    assert type(ours).__name__ == type(theirs).__name__
    with ours.disable_adapter():
        assert torch.equal(says(ours), says(make()))
    ours.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
        read = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert relative(says(read), plain) <= 1e-5
    for name in ("ours", "theirs"):
        assert torch.equal(says(PeftModel.from_pretrained(make(), tmp_path / name)), plain)
    ours.merge_adapter()
    assert relative(says(ours), plain) <= 1e-5
    ours.unmerge_adapter()
    assert torch.equal(says(ours), plain)
    assert relative(says(ours.merge_and_unload()), plain) <= 1e-5


@pytest.mark.parametrize(
    "case", ["head whole", "rows by list", "embedding and convolution", "attention", "classification"]
)
def test_22_and_16_these_come_off_and_go_through_state_dicts_as_well(case: str, tmp_path: Path) -> None:
    make, fields = CASES[case]
    ours, theirs = pair(case)
    named = get_peft_model_state_dict(ours)
    assert named.keys() == peft.get_peft_model_state_dict(theirs).keys()
    other = get_peft_model(make(), LoraConfig(r=4, **copy.deepcopy(fields)))
    assert set_peft_model_state_dict(other, named) == ([], [])
    assert torch.equal(says(other), says(ours))
    ours.save_pretrained(tmp_path, state_dict={name: tensor * 2 for name, tensor in ours.state_dict().items()})
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == named.keys()
    assert all(torch.equal(saved[name], tensor * 2) for name, tensor in named.items())
    assert same(bytes_of(ours.unload()), bytes_of(make()))


def test_40_switching_between_adapters_with_whole_modules() -> None:
    ours, _ = pair("head whole")
    first = says(ours)
    ours.add_adapter("b", config(modules_to_save=["lm_head"]))
    ours.set_adapter("b")
    assert torch.equal(says(ours), says(tiny_llama()))
    assert ours.modules_to_save == {"lm_head"}
    with pytest.raises(AdapterError, match="only one of them can act at a time"):
        ours.set_adapter(["default", "b"])
    assert ours.active_adapter == "b"
    ours.set_adapter("default")
    assert torch.equal(says(ours), first)


def test_40_a_head_is_trained_whole_by_its_task_and_no_pair_is_put_on_it() -> None:
    mine = LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear")
    model = get_peft_model(bert()(), mine)
    assert isinstance(model, PeftModelForSequenceClassification)
    assert mine.modules_to_save is None
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    names = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {f"base_model.model.classifier.lora.default.copy.{part}" for part in ("weight", "bias")} <= names
    model.train()
    model(SHORT, labels=torch.tensor([1])).loss.backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)


def test_d12_modules_and_embeddings_that_are_not_there_are_errors() -> None:
    with pytest.raises(TargetError, match=r'modules_to_save "lm_haed" matches no module.*Did you mean "lm_head"'):
        get_peft_model(tiny_llama(), config(modules_to_save=["lm_haed"]))
    with pytest.raises(TargetError, match=r'trainable_tokens "wte" matches no module'):
        get_peft_model(tiny_llama(), config(trainable_token_indices={"wte": [1]}))
    with pytest.raises(TargetError, match="does not say its input embedding; name it"):
        get_peft_model(mixed(), LoraConfig(target_modules=["out"], trainable_token_indices=[1]))
    model = get_peft_model(tiny_llama(), config(modules_to_save=["nope"], allow_unmatched=True))
    assert not [name for name in model.state_dict() if ".copy." in name]


def test_d23_only_the_rows_are_stored(tmp_path: Path) -> None:
    ours, _ = pair("rows by list")
    ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rows = {name: one.shape for name, one in saved.items() if "token" in name}
    assert rows == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (3, 32)}


def test_38_status_names_them_as_peft_does() -> None:
    for case in ("head whole", "rows by list", "embedding"):
        ours, theirs = pair(case)
        found = {(one.name, one.module_type) for one in ours.get_layer_status()}
        assert found == {(one.name, one.module_type) for one in theirs.get_layer_status()}, case


def test_45_a_random_start_changes_the_model_and_others_do_not() -> None:
    base = says(tiny_llama())
    for init in (True, "gaussian"):
        assert torch.equal(says(get_peft_model(tiny_llama(), config(init_lora_weights=init))), base)
    model = get_peft_model(tiny_llama(), config(init_lora_weights=False))
    assert not torch.equal(says(model), base)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(bool(one.grad.any()) for one in model.parameters() if one.grad is not None)


def test_45_a_seed_gives_the_same_start_again() -> None:
    torch.manual_seed(3)
    one = get_peft_model(tiny_llama(), config())
    torch.manual_seed(3)
    other = get_peft_model(tiny_llama(), config())
    assert same(bytes_of(one), bytes_of(other))
    torch.manual_seed(4)
    assert not same(bytes_of(get_peft_model(tiny_llama(), config())), bytes_of(other))


def test_a_resized_vocabulary_that_peft_saved_comes_along(tmp_path: Path) -> None:
    def larger() -> Any:
        model = tiny_llama()
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            model.resize_token_embeddings(264)
        return model

    with quiet():
        theirs = peft.get_peft_model(larger(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    read = PeftModel.from_pretrained(larger(), tmp_path)
    assert relative(logits(read), logits(theirs.eval())) <= 1e-5
