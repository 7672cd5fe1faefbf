"""PeftModel: names, attributes, which adapter acts and which is trained, status."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pairs import both, bytes_of, config, fill, logits, quiet, relative, same, tiny_gpt2, two, wrapped
from tiny import IDS, tiny_llama
from torch import nn

from sideroad.attaching import attached
from sideroad.errors import AdapterError, ConfigError, TargetError
from sideroad.peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)

CASES: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "lora_alpha": 5},
    {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.*": 3}},
    {"target_modules": ["q_proj", "lm_head"]},
]


@pytest.mark.parametrize("fields", CASES)
def test_the_same_logits_as_peft(fields: dict[str, Any]) -> None:
    ours, theirs = both(**fields)
    assert relative(logits(ours), logits(theirs)) <= 1e-5
    assert relative(logits(ours), logits(tiny_llama())) > 1e-2


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_the_same_logits_as_peft_on_conv1d_with_biases(bias: str) -> None:
    ours, theirs = both(tiny_gpt2, target_modules=["c_attn", "mlp.c_proj"], bias=bias)
    assert relative(logits(ours), logits(theirs)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_29_a_16_bit_base_gets_fp32_adapters_unless_told_otherwise(dtype: torch.dtype) -> None:
    ours, theirs = both(lambda: tiny_llama().to(dtype))
    assert {p.dtype for n, p in ours.named_parameters() if ".lora." in n} == {torch.float32}
    assert logits(ours).dtype is dtype
    assert relative(logits(ours), logits(theirs)) <= 4 * torch.finfo(dtype).eps
    ours, theirs = both(lambda: tiny_llama().to(dtype), autocast=False)
    assert {p.dtype for n, p in ours.named_parameters() if ".lora." in n} == {dtype}
    assert relative(logits(ours), logits(theirs)) <= 4 * torch.finfo(dtype).eps


def test_29_a_64_bit_base_gets_64_bit_adapters() -> None:
    ours, theirs = both(lambda: tiny_llama().double())
    assert {p.dtype for n, p in ours.named_parameters() if ".lora." in n} == {torch.float64}
    assert relative(logits(ours), logits(theirs)) <= 1e-6


def test_1_names_and_attributes_fall_through() -> None:
    model = wrapped()
    assert type(model) is PeftModelForCausalLM
    base = model.get_base_model()
    assert model.base_model.model is base
    assert (model.config, model.device, model.base_model_torch_dtype) == (base.config, base.device, torch.float32)
    assert model.active_adapter == "default" == model.base_model.active_adapter
    assert model.active_adapters == ["default"]
    assert model.active_peft_config is model.peft_config["default"]
    assert model.modules_to_save is None
    both_projections = [f"model.layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("q_proj", "v_proj")]
    assert model.targeted_module_names == both_projections == both()[1].targeted_module_names
    assert model.base_model.model.model.layers[0].self_attn.q_proj is model.model.model.layers[0].self_attn.q_proj
    names = {name for name, _ in model.named_parameters() if ".lora." not in name}
    assert names == {f"base_model.model.{name}" for name, _ in tiny_llama().named_parameters()}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.nothing


@pytest.mark.parametrize("name", ["default", "lora", "lora_A", "q_proj", "a.b", "model", "A"])
def test_2_and_3_any_name_is_respected(name: str) -> None:
    model = get_peft_model(tiny_llama(), config(), adapter_name=name)
    model.add_adapter(f"{name}x", config())
    model.add_adapter(name[:-1] or "other", config())
    fill(model)
    assert model.active_adapters == [name]
    alone = logits(model)
    model.delete_adapter(f"{name}x")
    model.delete_adapter(name[:-1] or "other")
    assert torch.equal(logits(model), alone)


def test_4_a_name_that_is_taken_is_refused_and_nothing_changes() -> None:
    model = two()
    before = bytes_of(model)
    with pytest.raises(AdapterError, match='an adapter named "b" is attached already'):
        model.add_adapter("b", config(r=8))
    assert same(bytes_of(model), before)
    assert model.peft_config["b"].r == 2


def test_a_configuration_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    base = tiny_llama()
    before, flags = bytes_of(base), [one.requires_grad for one in base.parameters()]
    with pytest.raises(TargetError, match="nope"):
        get_peft_model(base, config(target_modules=["q_proj", "nope"]))
    assert same(bytes_of(base), before)
    assert [one.requires_grad for one in base.parameters()] == flags
    assert attached(base) is None
    model = wrapped()
    with pytest.raises(TargetError, match="nope"):
        model.add_adapter("c", config(target_modules=["nope"]))
    assert list(model.peft_config) == ["default"]


def test_5_injection_equals_the_wrapped_model() -> None:
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(), config())
    torch.manual_seed(3)
    base = tiny_llama()
    injected = inject_adapter_in_model(config(), base)
    assert injected is base
    fill(model)
    fill(injected)
    assert torch.equal(logits(model), logits(injected))
    assert get_model_status(injected).num_adapter_layers == 4
    with pytest.raises(AdapterError, match="on a wrapped model"):
        inject_adapter_in_model(config(), model, "x")


def test_d20_wrapping_twice_is_refused() -> None:
    model = wrapped()
    for again in (model, model.base_model, model.get_base_model()):
        with pytest.raises(AdapterError, match=r"has adapters already \(default\).*unload"):
            get_peft_model(again, config())
    base = model.unload()
    assert get_peft_model(base, config()).active_adapter == "default"


@pytest.mark.parametrize("fields", [{}, {"bias": "all", "target_modules": ["c_attn"]}])
def test_22_and_d20_unload_gives_the_exact_original(fields: dict[str, Any]) -> None:
    base = tiny_gpt2() if fields else tiny_llama()
    next(base.parameters()).requires_grad_(False)
    before, flags = bytes_of(base), {name: one.requires_grad for name, one in base.named_parameters()}
    says = logits(base)
    model = get_peft_model(base, config(**fields))
    fill(model)
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_adapter()
    back = model.unload()
    assert back is base
    assert same(bytes_of(back), before)
    assert {name: one.requires_grad for name, one in back.named_parameters()} == flags
    assert torch.equal(logits(back), says)
    assert attached(back) is None
    assert "save_pretrained" not in vars(back)
    assert model.peft_config == {}


def test_30_only_the_adapter_learns() -> None:
    model = get_peft_model(tiny_llama().train(), config())
    before = bytes_of(model)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora." in name}
    assert {name for name, one in model.named_parameters() if one.grad is not None} == changed


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "target_modules": "all-linear"}])
def test_the_same_gradients_as_peft(fields: dict[str, Any]) -> None:
    ours, theirs = both(**fields)
    ours(IDS, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    expected = {n.replace(".lora_", ".").replace(".default.weight", ""): p.grad for n, p in theirs.named_parameters()}
    found = {n.replace(".lora.default.", "."): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    for name, grad in found.items():
        assert grad is not None
        assert relative(grad, expected[name]) <= 1e-4, name


def test_the_line_about_parameters_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = both()
    ours.print_trainable_parameters()
    mine = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert mine == capsys.readouterr().out
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_28_generate_with_keywords_and_positions() -> None:
    ours, theirs = both()
    options = {"max_new_tokens": 5, "do_sample": False}
    with quiet():
        expected = theirs.generate(input_ids=IDS, **options)
        assert torch.equal(ours.generate(IDS, **options), expected)
        assert torch.equal(ours.generate(input_ids=IDS, **options), expected)
    embedded = ours.get_input_embeddings()(IDS)
    assert torch.equal(logits(ours, None, inputs_embeds=embedded), logits(ours))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_28_and_29_generation_in_half_precision_and_a_finite_forward_under_autocast(dtype: torch.dtype) -> None:
    model = wrapped(lambda: tiny_llama().to(dtype))
    with quiet():
        made = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 14)
    assert torch.equal(made[:, 10], logits(model)[:, -1].argmax(-1))
    ours, theirs = both()
    with torch.autocast("cpu", dtype):
        mine, other = logits(ours), logits(theirs)
    assert bool(mine.isfinite().all())
    assert relative(mine, other) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", ["add_weighted_adapter", "hotswap_adapter", "push_to_hub"])
def test_what_is_not_there_is_refused_by_its_name(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} is not supported"):
        getattr(wrapped(), method)("a", b=1)


def test_a_copy_has_adapters_of_its_own() -> None:
    model = wrapped()
    other = copy.deepcopy(model)
    fill(other, seed=5)
    assert not torch.equal(logits(other), logits(model))
    other.add_adapter("b", config())
    other.set_adapter("b")
    assert list(model.peft_config) == model.active_adapters == ["default"]


def test_a_model_that_is_no_transformer_works_as_well() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    assert type(model) is PeftModel
    fill(model)
    x = torch.randn(3, 4)
    assert not torch.equal(model(x), base[2](torch.relu(base[0].weight @ x.T).T))
    with model.disable_adapter():
        assert model(x).shape == (3, 2)


def test_33_a_base_is_prepared_for_training_in_few_bits() -> None:
    model = prepare_model_for_kbit_training(tiny_llama().to(torch.bfloat16))
    assert {(one.dtype, one.requires_grad) for one in model.parameters()} == {(torch.float32, False)}
    model = tiny_llama().to(torch.bfloat16)
    model.is_loaded_in_4bit = True
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    trained = get_peft_model(model.train(), config())
    trained(IDS, labels=IDS).loss.backward()
    assert all(one.grad is not None for one in trained.parameters() if one.requires_grad)
