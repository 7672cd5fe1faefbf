"""DoRA, starts from the weight and from data, and LoRA-FA through the front door, beside PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import QV, bytes_of, config, fill, logits, quiet, relative, same, tiny_gpt2, wrapped
from peft.optimizers import create_lorafa_optimizer as pefts_lorafa_optimizer
from safetensors.torch import load_file, save_file
from test_parts import mixed
from tiny import IDS, tiny_llama
from torch import Tensor, nn

from sideroad import Adapter, AdapterConfig, LoraMethod, attach
from sideroad import peft as door
from sideroad.errors import AdapterError, ConfigError, TargetError

IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3))


class Images(nn.Module):
    """A convolution of pictures and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.out = nn.Linear(54, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.conv(x).flatten(1))
        return found


def images() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Images().eval()


def says(model: nn.Module) -> Tensor:
    """What a model of any kind of this file says."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad(), quiet():
        if isinstance(base, Images):
            found: Tensor = model(IMAGE)
            return found
        return logits(model, IDS % 20)


DORA: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (tiny_llama, {"target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}),
    "rslora, patterns": (
        tiny_llama, {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "rank_pattern": {"o_proj": 2}},
    ),
    "transposed": (tiny_gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "lora_alpha": 6}),
    "convolution": (images, {"target_modules": ["conv", "out"]}),
    "convolution 1d": (mixed, {"target_modules": ["conv", "out"]}),
}  # fmt: skip


def trained_by_peft(case: str) -> Any:
    """PEFT's DoRA adapter with values that are not those of the start, magnitudes too."""
    make, fields = DORA[case]
    with quiet():
        model = peft.get_peft_model(make(), peft.LoraConfig(r=4, use_dora=True, **fields))
    torch.manual_seed(0)
    for name, one in model.named_parameters():
        if "magnitude" in name:
            one.data.mul_(1 + 0.2 * torch.randn_like(one))
        elif "lora_" in name:
            one.data.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("case", DORA)
def test_dora_of_pefts_files_is_the_same_here_and_in_files_of_ours(case: str, tmp_path: Path) -> None:
    make, _ = DORA[case]
    theirs = trained_by_peft(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = door.PeftModel.from_pretrained(make(), tmp_path / "theirs")
    assert ours.peft_config["default"].use_dora is True
    assert relative(says(theirs), says(make())) > 1e-2
    assert relative(says(ours), says(theirs)) <= 1e-5
    ours.save_pretrained(tmp_path / "ours")
    files = [load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs")]
    assert same({name: files[0][name] for name in files[1]}, files[1])
    assert set(files[0]) == set(files[1])
    with quiet():
        assert relative(says(peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()), says(theirs)) <= 1e-5
    with ours.disable_adapter():
        assert torch.equal(says(ours), says(make()))
    before = bytes_of(ours.get_base_model())
    ours.merge_adapter()
    assert relative(says(ours), says(theirs)) <= 1e-5
    ours.unmerge_adapter()
    assert same(before, bytes_of(ours.get_base_model()))
    assert relative(says(ours.merge_and_unload()), says(theirs)) <= 1e-5


@pytest.mark.parametrize("case", DORA)
def test_a_new_dora_adapter_is_the_base_and_learns_as_pefts(case: str) -> None:
    make, fields = DORA[case]
    ours = door.get_peft_model(make(), door.LoraConfig(r=4, use_dora=True, **fields))
    assert torch.equal(says(ours), says(make()))
    with quiet():
        theirs = peft.get_peft_model(make(), peft.LoraConfig(r=4, use_dora=True, **fields)).eval()
        peft.set_peft_model_state_dict(theirs, door.get_peft_model_state_dict(ours))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            found = model(IMAGE) if case == "convolution" else model(IDS % 20).logits
            found.square().mean().backward()
            optimizer.step()
    assert relative(says(ours), says(theirs)) <= 1e-5
    assert relative(says(ours), says(make())) > 1e-4
    with quiet():
        there = peft.get_peft_model_state_dict(theirs)
    here = door.get_peft_model_state_dict(ours)
    assert here.keys() == there.keys()
    for name, one in here.items():
        assert one.shape == there[name].shape
        torch.testing.assert_close(one, there[name], rtol=1e-3, atol=1e-5)


def two_dora() -> door.PeftModel:
    model = wrapped(use_dora=True)
    model.add_adapter("b", config(use_dora=True, r=2, target_modules=["k_proj", "q_proj"]))
    fill(model, size=0.5, seed=1)
    return model


def test_d25_two_dora_adapters_on_one_layer_act_one_at_a_time() -> None:
    model = two_dora()
    before = says(model)
    for wrong in (lambda: model.set_adapter(["default", "b"]), lambda: model.merge_adapter(["default", "b"])):
        with pytest.raises(AdapterError, match=r'"default" and "b" are both DoRA adapters of .*q_proj'):
            wrong()
        assert torch.equal(says(model), before)
    model.set_adapter("b")
    alone = says(model)
    assert relative(alone, before) > 1e-3
    model.merge_adapter()
    assert relative(says(model), alone) <= 1e-5
    model.unmerge_adapter()
    model.add_adapter("plain", config(r=2, target_modules=["q_proj"]))
    fill(model, seed=2)
    model.set_adapter(["b", "plain"])
    apart = says(model)
    model.merge_adapter()
    assert relative(says(model), apart) <= 1e-5


def test_26_rows_of_dora_adapters_are_each_their_adapters_alone() -> None:
    ids = torch.arange(40).reshape(4, 10) * 3
    names = ["b", "__base__", "default", "b"]
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**QV, use_dora=True)).eval()
    with pytest.raises(ValueError, match="DoRA"):
        theirs(ids, adapter_names=["default", "__base__", "default", "default"])
    model = two_dora()
    mixed_rows = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            expected = logits(tiny_llama(), ids[row : row + 1])
        else:
            model.set_adapter(name)
            expected = logits(model, ids[row : row + 1])
        assert relative(mixed_rows[row], expected[0]) <= 1e-5
    model.train()
    model.set_requires_grad(["default", "b"])
    model(ids, labels=ids, adapter_names=["b", "b", "__base__", "b"]).loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if ".lora.b." in name}
    assert all(one is not None and bool(one.any()) for one in found.values())


@pytest.mark.parametrize(
    ("make", "targets", "words"),
    [
        (mixed, ["emb", "out"], "emb is an embedding.* DoRA cannot act on it. Exclude it"),
        (mixed, ["attn", "out"], r"(?s)attn is a projection of nn.MultiheadAttention, which reads its weight; DoRA.*"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ["0"], "0 has a pair for each of its groups"),
    ],
)
def test_dora_where_it_cannot_act_is_refused_with_the_layer(
    make: Callable[[], nn.Module], targets: list[str], words: str
) -> None:
    model = make()
    before = bytes_of(model)
    with pytest.raises(TargetError, match=words):
        door.get_peft_model(model, door.LoraConfig(r=2, use_dora=True, target_modules=targets))
    assert same(before, bytes_of(model))


def test_pefts_dora_on_an_embedding_is_refused_and_not_misread(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["emb", "out"], "use_dora": True}
    with quiet():
        peft.get_peft_model(mixed(), peft.LoraConfig(**fields)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.emb.lora_magnitude_vector"
    tensors = load_file(file)
    for length in (tensors[key].numel(), 20):
        save_file({**tensors, key: torch.ones(length)}, file, {"format": "pt"})
        with pytest.raises(AdapterError, match=rf"{key}: the DoRA magnitude of an embedding.* not supported"):
            door.PeftModel.from_pretrained(mixed(), tmp_path)


def test_what_a_magnitude_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ensure_weight_tying is set, and use_dora is True"):
        config(use_dora=True, ensure_weight_tying=True)
    with pytest.raises(ConfigError, match="use_dora is 'yes'; expected True or False"):
        config(use_dora="yes")
    model = wrapped(use_dora=True)
    for wrong in (lambda: model.set_scale("default", 0.5), lambda: model.scale_layer(2.0)):
        with pytest.raises(ConfigError, match=r"set_scale on a DoRA adapter .*handle.activate"):
            wrong()
    model.unscale_layer()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": False}))
    with pytest.raises(AdapterError, match="a DoRA magnitude, but use_dora is not true"):
        door.PeftModel.from_pretrained(tiny_llama(), tmp_path)


STARTS = ["pissa", "pissa_niter_16", "olora"]


def a_step(model: nn.Module, rate: float = 0.5) -> None:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=rate)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", STARTS)
def test_45_a_start_from_the_weight_goes_into_files_and_on(init: str, dora: bool, tmp_path: Path) -> None:
    model = door.get_peft_model(tiny_llama(), config(init_lora_weights=init, use_dora=dora))
    base = tiny_llama()
    assert relative(logits(model), logits(base)) <= 1e-6
    a_step(model)
    assert relative(logits(model), logits(base)) > 1e-3
    model.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "init_lora_weights" not in file
    assert file["r"] == 8
    with quiet():
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) <= 1e-5
    again = door.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    for one in (model, again):
        a_step(one)
    assert torch.equal(logits(again), logits(model))
    state = door.get_peft_model_state_dict(model)
    with quiet():
        peft.set_peft_model_state_dict(theirs, state)
    assert relative(logits(theirs), logits(model)) <= 1e-5
    door.set_peft_model_state_dict(again, state)
    assert torch.equal(logits(again), logits(model))
    merged = model.merge_and_unload()
    assert relative(logits(merged), logits(again)) <= 1e-5


def test_15_and_43_a_started_adapter_is_saved_from_a_state_dict_and_loaded_in_place(tmp_path: Path) -> None:
    model = door.get_peft_model(tiny_llama(), config(init_lora_weights="pissa", use_dora=True))
    a_step(model)
    before = logits(model)
    model.save_pretrained(tmp_path / "a", state_dict={name: one.clone() for name, one in model.state_dict().items()})
    pointers = {name: one.data_ptr() for name, one in model.state_dict().items()}
    a_step(model)
    assert not torch.equal(logits(model), before)
    model.load_adapter(tmp_path / "a", "default", is_trainable=True)
    assert torch.equal(logits(model), before)
    assert {name: one.data_ptr() for name, one in model.state_dict().items()} == pointers
    state = door.get_peft_model_state_dict(wrapped(use_dora=True))
    with pytest.raises(AdapterError, match="A0 is missing"):
        door.set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_45_a_start_from_the_weight_is_pefts_and_learns_as_pefts(init: str) -> None:
    ours = door.get_peft_model(tiny_llama(), config(init_lora_weights=init))
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**QV, init_lora_weights=init)).eval()
    for path, delta in ours.base_model.handle.deltas("default").items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(delta.B @ delta.A, product, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            layer.base_layer.weight, tiny_llama().get_submodule(path).weight - delta.scale * delta.B0 @ delta.A0,
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    for model in (ours, theirs):
        a_step(model, 0.1)
    assert relative(logits(ours), logits(theirs)) <= 1e-4
    assert relative(logits(ours), logits(tiny_llama())) > 1e-4


@pytest.mark.parametrize("init", STARTS)
def test_d20_peft1929_a_start_from_the_weight_leaves_other_adapters_and_the_base_alone(init: str) -> None:
    model = wrapped()
    before, weights = logits(model), bytes_of(model.get_base_model())
    model.add_adapter("started", config(init_lora_weights=init))
    assert torch.equal(logits(model), before)
    now = bytes_of(model.get_base_model())
    assert all(torch.equal(now[name], one) for name, one in weights.items())
    model.set_adapter("started")
    a_step(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert same(bytes_of(model.unload()), bytes_of(tiny_llama()))


def test_d20_peft1929_as_measured_in_peft() -> None:
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**QV)).eval()
        before = logits(theirs)
        theirs.add_adapter("started", peft.LoraConfig(**QV, init_lora_weights="pissa"))
        assert relative(logits(theirs), before) > 1e-2


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 250, (4, 16), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, 12:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids % 5 == 0, -100)})
    return found


def eva_pair(rho: float, **more: Any) -> tuple[door.PeftModel, Any]:
    """Ours and PEFT's, started from the same batches."""
    fields: dict[str, Any] = {**QV, "target_modules": "all-linear", "init_lora_weights": "eva", **more}
    ours = door.get_peft_model(tiny_llama(), door.LoraConfig(**fields, eva_config=door.EvaConfig(rho=rho)))
    door.initialize_lora_eva_weights(ours, batches())
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields, eva_config=peft.EvaConfig(rho=rho)))
        peft.initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    return ours, theirs


def test_45_eva_finds_the_directions_that_pefts_finds() -> None:
    ours, theirs = eva_pair(1.0)
    here, there = door.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert here.keys() == there.keys()
    inputs: dict[str, list[Tensor]] = {}
    base = tiny_llama()
    paths = [name.removesuffix(".lora_A.weight") for name in here if "lora_A" in name]
    for path in paths:
        layer = base.get_submodule(path.removeprefix("base_model.model."))
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs.setdefault(path, []).append(args[0]))
    for batch in batches():
        logits(base, batch["input_ids"], attention_mask=batch["attention_mask"])
    counts = torch.cat([(one["labels"] != -100) & (one["attention_mask"] == 1) for one in batches()])
    for path in paths:
        mine, other = (state[f"{path}.lora_A.weight"] for state in (here, there))
        torch.testing.assert_close(mine @ mine.t(), torch.eye(4), rtol=0, atol=1e-5)
        x = torch.cat(inputs[path])[counts]
        explained, pefts = (float((x @ A.t()).square().sum()) for A in (mine, other))
        # PEFT stops before its directions are the best ones
        assert 0.9 * explained <= pefts <= explained * (1 + 1e-5), path
        assert not here[f"{path}.lora_B.weight"].any()
    assert torch.equal(logits(ours), logits(tiny_llama()))


def test_45_eva_deals_ranks_and_files_keep_them(tmp_path: Path) -> None:
    ours, theirs = eva_pair(3.0, r=2, lora_alpha=6)
    handle = ours.base_model.handle
    ranks = handle.adapter("default").ranks
    budget = 2 * 14
    assert sum(ranks.values()) == budget
    assert max(ranks.values()) > 2
    with quiet():
        dealt = [one.shape[0] for name, one in peft.get_peft_model_state_dict(theirs).items() if "lora_A" in name]
    assert sum(dealt) == budget
    assert {delta.scale for delta in handle.deltas("default").values()} == {3.0}
    assert {name for name, one in ours.named_parameters() if one.requires_grad} == {
        f"base_model.model.{path}.lora.default.{part}" for path in ranks for part in "AB"
    }
    a_step(ours)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["eva_config"]["rho"] == 3.0
    with quiet():
        read = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert relative(logits(read), logits(ours)) <= 1e-5
    assert relative(logits(read), logits(tiny_llama())) > 1e-3
    again = door.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(ours))
    assert again.peft_config["default"].rank_pattern == ours.peft_config["default"].rank_pattern


def test_45_a_layer_that_gets_no_rank_loses_its_pair(tmp_path: Path) -> None:
    fields: dict[str, Any] = {**QV, "r": 1, "target_modules": ["k_proj", "o_proj", "down_proj"]}
    ours = door.get_peft_model(tiny_llama(), door.LoraConfig(**fields, init_lora_weights="eva", use_dora=True,
                                                             eva_config={"rho": 6.0}))  # fmt: skip
    ours.add_adapter("other", config())
    door.initialize_lora_eva_weights(ours, batches(1))
    ranks = ours.base_model.handle.adapter("default").ranks
    assert sum(ranks.values()) == 6
    assert len(ranks) < 6
    assert ours.active_adapter == "default"
    assert torch.equal(logits(ours), logits(tiny_llama()))
    fill(ours)
    ours.save_pretrained(tmp_path)
    with quiet():
        assert relative(logits(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), logits(ours)) <= 1e-5


def test_45_evas_masks_count_as_pefts() -> None:
    """Tokens that are left out change nothing, whatever they are."""
    found = []
    for change, options in ((0, {}), (7, {}), (7, {"use_label_mask": False}), (0, {"use_label_mask": False})):
        model = door.get_peft_model(tiny_llama(), config(target_modules=["q_proj"], layers_to_transform=[0],
                                                         init_lora_weights="eva", eva_config=options))  # fmt: skip
        changed = []
        for batch in batches():
            out = (batch["labels"] == -100) & (batch["attention_mask"] == 1)
            changed.append({**batch, "input_ids": torch.where(out, batch["input_ids"] + change, batch["input_ids"])})
        door.initialize_lora_eva_weights(model, changed)
        found.append(torch.cat(list(door.get_peft_model_state_dict(model).values())[:1]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[2], found[3])


def test_eva_asks_for_what_it_needs() -> None:
    plain = door.get_peft_model(tiny_llama(), config())
    with pytest.raises(ConfigError, match="init_lora_weights of \"default\" is True; it must be 'eva'"):
        door.initialize_lora_eva_weights(plain, batches())
    with pytest.raises(AdapterError, match="LlamaForCausalLM is no PeftModel"):
        door.initialize_lora_eva_weights(tiny_llama(), batches())
    model = door.get_peft_model(tiny_llama(), config(init_lora_weights="eva"))
    assert torch.equal(logits(model), logits(tiny_llama()))
    before = bytes_of(model)
    with pytest.raises(ConfigError, match="there is none"):
        door.initialize_lora_eva_weights(model, [])
    with pytest.raises(AdapterError, match='no adapter is named "x"'):
        door.initialize_lora_eva_weights(model, batches(), adapter_name="x")
    whole = door.get_peft_model(tiny_llama(), config(target_modules=["embed_tokens"], init_lora_weights="eva"))
    with pytest.raises(TargetError, match="linear"):
        door.initialize_lora_eva_weights(whole, batches())
    assert same(before, bytes_of(model))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rho": 0.5}, "eva_config.rho is 0.5; expected 1 or more"),
        ({"tau": 2}, "eva_config.tau is 2; expected a number from 0 to 1"),
        ({"whiten": True}, "eva_config.whiten is set.*not supported yet"),
        ({"adjust_scaling_factors": False}, "eva_config.adjust_scaling_factors is False.*not supported yet"),
        ({"use_label_mask": 1}, "eva_config.use_label_mask is 1; expected True or False"),
        ({"roh": 1}, 'EvaConfig has no field "roh". Did you mean "rho"'),
    ],
)
def test_evas_options_are_checked(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(init_lora_weights="eva", eva_config=fields)
    with pytest.raises(ConfigError, match=r"eva_config is set, but init_lora_weights is True"):
        config(eva_config=door.EvaConfig())


def lorafa_pair(**fields: Any) -> tuple[door.PeftModel, Any]:
    ours = door.get_peft_model(tiny_llama(), config(**fields))
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**{**QV, **fields})).eval()
        peft.set_peft_model_state_dict(theirs, door.get_peft_model_state_dict(ours))
    return ours, theirs


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_34_lora_fa_trains_b_with_pefts_gradient(fields: dict[str, Any]) -> None:
    ours, theirs = lorafa_pair(**fields)
    mine = door.create_lorafa_optimizer(ours, r=4, lora_alpha=8, lr=1e-2)
    other = pefts_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-2)
    assert {name.rpartition(".")[2] for name, one in ours.named_parameters() if one.requires_grad} == {"B"}
    before = {name: one.clone() for name, one in door.get_peft_model_state_dict(ours).items() if "lora_A" in name}
    for _ in range(4):
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            # large gradients, beside which it does not matter where PEFT adds its epsilon
            (1e4 * model(IDS, labels=IDS).loss).backward()
            optimizer.step()
    here, there = door.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert all(torch.equal(here[name], one) for name, one in before.items())
    for name, one in here.items():
        # PEFT corrects the gradient in bfloat16
        assert relative(one, there[name]) <= (0 if "lora_A" in name else 0.05), name
    assert relative(logits(ours), logits(tiny_llama())) > 1e-3


def test_34_lora_fas_step_sees_the_gradient_of_the_cores_method_and_leaves_grad_alone() -> None:
    ours, _ = lorafa_pair()
    method = LoraMethod(rank=4, alpha=8, trains="B")
    core = attach(tiny_llama(), AdapterConfig(targets=("q_proj", "v_proj"), method=method))
    core.load("default", ours.base_model.handle.adapter("default"))
    optimizer = door.create_lorafa_optimizer(ours, 4, 8, lr=1e-3)
    for model in (ours, core.model):
        model(IDS, labels=IDS).loss.backward()
    plain = [delta.B.grad.clone() for delta in optimizer.deltas]
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(delta.B.grad, one) for delta, one in zip(optimizer.deltas, plain, strict=True))
    for path, delta in ours.base_model.handle.deltas("default").items():
        # after two steps with one gradient, Adam's first moment is 0.19 of it
        found = optimizer.state[delta.B]["exp_avg"] / 0.19
        torch.testing.assert_close(found, core.deltas("default")[path].B.grad, rtol=1e-4, atol=1e-9)


def test_34_lora_fa_keeps_no_input_and_refuses_what_it_is_not_for() -> None:
    for fields, word in (({"use_dora": True}, "DoraDelta"), ({"target_modules": ["embed_tokens"]}, "Embedding")):
        with pytest.raises(AdapterError, match=word):
            door.create_lorafa_optimizer(door.get_peft_model(tiny_llama(), config(**fields)), 4, 8, 1e-3)
    with pytest.raises(AdapterError, match="is no PeftModel"):
        door.create_lorafa_optimizer(tiny_llama(), 4, 8, 1e-3)
    layer = nn.Sequential(nn.Linear(64, 64))
    saved = []
    for freeze in (False, True):
        model = door.get_peft_model(layer, door.LoraConfig(r=2, target_modules=["0"]))
        if freeze:
            door.create_lorafa_optimizer(model, 2, 8, 1e-3)
        kept: list[int] = []
        x = torch.randn(100, 64)
        with torch.autograd.graph.saved_tensors_hooks(lambda one, k=kept: (k.append(one.numel()), one)[1], lambda t: t):
            model(x)
        saved.append(x.numel() in kept)
        layer = model.unload()
    assert saved == [True, False]


def test_adalora_of_pefts_files_is_plain_lora_here(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "init_r": 3, "target_r": 1, "total_step": 9}
    with quiet():
        theirs = peft.get_peft_model(tiny_llama(), peft.AdaLoraConfig(**fields)).eval()
        for name, one in theirs.named_parameters():
            if "lora_" in name:
                one.data.normal_(std=0.3)
        theirs.save_pretrained(tmp_path / "a")
    ours = door.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", is_trainable=True)
    assert relative(logits(ours), logits(theirs)) <= 1e-5
    assert ours.peft_config["default"].peft_type == "LORA"
    a_step(ours)
    ours.save_pretrained(tmp_path / "b")
    assert Adapter.load(tmp_path / "b").config.method.kind == "lora"
