"""Batched generation equals one prompt at a time, token by token, without a cache."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from sideroad.base.generation import end_ids, generate
from sideroad.base.identity import BaseIdentity
from sideroad.base.loading import Base
from sideroad.errors import BaseModelError

PROMPTS = [[5, 6, 7], [9], [20, 30, 40, 50, 60, 70, 80], [5, 6, 7, 8], [100, 101]]


@pytest.fixture(scope="module")
def base() -> Base:
    model = tiny_llama(3, initializer_range=0.4)
    return Base(model, tiny_tokenizer(), BaseIdentity("t", "t", "0", None, 1), torch.float32, torch.device("cpu"))


@torch.no_grad()
def naive(base: Base, prompt: list[int], count: int, stops: frozenset[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        token = int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_greedy_equals_the_naive_loop(base: Base, batch_size: int) -> None:
    free = [naive(base, prompt, 12, end_ids(base)) for prompt in PROMPTS]
    # A stop token from the middle of one answer makes rows end at different steps.
    extra = free[2][4]
    expected = [naive(base, prompt, 12, end_ids(base) | {extra}) for prompt in PROMPTS]
    assert len({len(row) for row in expected}) > 1
    assert generate(base, PROMPTS, max_new_tokens=12, stop_ids=[extra], batch_size=batch_size) == expected


def test_sampling_depends_on_seed_and_place_only(base: Base) -> None:
    def sample(prompts: list[list[int]], seed: int = 0, **more: float) -> list[list[int]]:
        return generate(base, prompts, max_new_tokens=10, temperature=1.0, seed=seed, **more)

    together = sample(PROMPTS)
    assert sample(PROMPTS) == together
    assert sample(PROMPTS, batch_size=2) == together
    assert sample(PROMPTS[:2]) == together[:2]
    assert sample(PROMPTS, seed=1) != together
    assert sample([[5, 6, 7]] * 2)[0] != sample([[5, 6, 7]] * 2)[1]


def test_a_tiny_top_p_is_greedy(base: Base) -> None:
    greedy = generate(base, PROMPTS, max_new_tokens=8)
    assert generate(base, PROMPTS, max_new_tokens=8, temperature=1.0, top_p=1e-6) == greedy
    assert generate(base, PROMPTS, max_new_tokens=8, temperature=1.0, top_p=0.9) != greedy


def test_tokens_are_seen_as_they_come_and_can_be_refused(base: Base) -> None:
    seen: list[int] = []
    whole = generate(base, PROMPTS[:1], max_new_tokens=8, on_token=seen.append)[0]
    assert seen == whole
    assert len(whole) == 8
    seen.clear()

    def three(token: int) -> bool:
        seen.append(token)
        return len(seen) < 3

    assert generate(base, PROMPTS[:1], max_new_tokens=8, on_token=three) == [whole[:3]]


def test_finished_prompts_are_counted(base: Base) -> None:
    counts: list[int] = []
    generate(base, PROMPTS, max_new_tokens=8, batch_size=2, on_finished=counts.append)
    assert counts == sorted(counts)
    assert counts[-1] == len(PROMPTS)
    assert {2, len(PROMPTS)} <= set(counts)
    stop = generate(base, PROMPTS[:1], max_new_tokens=3)[0][1]
    counts.clear()
    generate(base, PROMPTS[:1] * 2, max_new_tokens=8, stop_ids=[stop], on_finished=counts.append)
    assert counts == [0, 2]


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(base: Base, temperature: float) -> None:
    with pytest.raises(BaseModelError, match=rf"temperature is {temperature}; give 0 \(likeliest token\)"):
        generate(base, PROMPTS, max_new_tokens=8, temperature=temperature)


def test_end_ids_come_from_model_tokenizer_and_template(base: Base) -> None:
    assert end_ids(base) == {2}
    other = tiny_tokenizer()
    other.eos_token = "<|endoftext|>"
    changed = Base(base.model, other, base.identity, base.dtype, base.device)
    assert end_ids(changed) == {0, 2}
    base.model.generation_config.eos_token_id = [2, 7]
    assert end_ids(base) == {2, 7}
    base.model.generation_config.eos_token_id = 2


def test_the_mode_of_the_model_is_kept(base: Base) -> None:
    base.model.train()
    generate(base, PROMPTS[:1], max_new_tokens=1)
    assert base.model.training
    base.model.eval()


def test_everything_wrong_is_reported_at_once(base: Base) -> None:
    with pytest.raises(BaseModelError) as caught:
        generate(base, [[], [999], [1] * 510], max_new_tokens=4, temperature=-1, top_p=0, on_token=print, batch_size=0)
    message = str(caught.value)
    assert "generation: 7 problems" in message
    assert "prompt 0 is empty" in message
    assert "prompt 1 holds ids outside 0..258" in message
    assert "prompt 2 has 510 tokens and asks for 4 more; the model has 512 positions" in message
    assert "ask for at most 2" in message
    assert "on_token follows one prompt; 3 were given" in message
    assert generate(base, [], max_new_tokens=1) == []


def test_a_sliding_window_and_other_architectures() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    window = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.4,
    )  # fmt: skip
    absolute = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
    for model in (MistralForCausalLM(window).eval(), GPT2LMHeadModel(absolute).eval()):
        identity = BaseIdentity("t", "t", "0", None, 1)
        base = Base(model, tiny_tokenizer(), identity, torch.float32, torch.device("cpu"))
        expected = [naive(base, prompt, 10, end_ids(base)) for prompt in PROMPTS]
        assert generate(base, PROMPTS, max_new_tokens=10) == expected


def test_an_encoder_does_not_generate() -> None:
    from transformers import ViTConfig, ViTModel

    settings = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    settings.vocab_size = 10
    identity = BaseIdentity("t", "t", "0", None, 1)
    base = Base(ViTModel(settings), tiny_tokenizer(), identity, torch.float32, torch.device("cpu"))
    with pytest.raises(BaseModelError, match=r"ViTModel keeps no key-value cache, so it does not generate text"):
        generate(base, [[1]], max_new_tokens=1)
