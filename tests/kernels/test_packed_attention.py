"""Attention over a packed row, and the context that puts it into a model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import bloom, gemma2, llama, mistral, qwen3

from sideroad.kernels.causal_loss import forward_logits
from sideroad.kernels.packed_attention import (
    UnsupportedAttentionError,
    attend_segments,
    is_installed,
    refusal,
    segment_attention,
    window,
)
from sideroad.segments import apart

LENGTHS = (5, 1, 9, 3)


def draw(heads: int, groups: int, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, sum(LENGTHS), count, width) for count in (heads, groups, groups)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).transpose(1, 2) for s in shapes]


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    allowed = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    products = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (products.masked_fill(~allowed, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_equals_the_block_mask_in_value_and_gradient(groups: int, scale: float | None) -> None:
    results = []
    for compute in (lambda *qkv: attend_segments(*qkv, apart(LENGTHS), scale=scale), lambda *qkv: masked(*qkv, scale)):
        inputs = [each.clone().requires_grad_() for each in draw(4, groups)]
        output = compute(*inputs)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        results.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert results[0][0].is_contiguous()


def test_grouped_heads_run_on_the_flash_kernel() -> None:
    inputs = [each.float().requires_grad_() for each in draw(4, 2)]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # anything else raises
        attend_segments(*inputs, apart(LENGTHS), scale=None).sum().backward()


def test_dropout_reaches_the_kernel() -> None:
    inputs = draw(4, 2)
    torch.manual_seed(0)
    dropped = attend_segments(*inputs, apart(LENGTHS), scale=None, dropout=0.5)
    assert not torch.allclose(dropped, attend_segments(*inputs, apart(LENGTHS), scale=None))


def test_context_restores_the_model_however_it_ends() -> None:
    model = llama()
    with segment_attention(model):
        assert is_installed(model)
        with segment_attention(model):
            pass
        assert is_installed(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), segment_attention(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("make", [llama, mistral, qwen3])
def test_unpacked_use_is_that_of_the_model(make: object) -> None:
    model = make()  # type: ignore[operator]
    ids = torch.randint(1, 97, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    prompt = {"input_ids": ids[:, :6], "attention_mask": mask[:, :6], "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        plain, padded = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits
        text = model.generate(**prompt)
        with segment_attention(model):
            assert torch.equal(model(input_ids=ids).logits, plain)
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, padded)
            assert torch.equal(model.generate(**prompt), text)


def test_refusals_name_the_model_and_the_reason() -> None:
    assert refusal(llama()) is None
    assert refusal(gemma2()) == "Gemma2ForCausalLM runs 'eager' attention; only 'sdpa' is replaced"
    model = bloom()
    with pytest.raises(UnsupportedAttentionError, match="BloomForCausalLM"), segment_attention(model):
        pass
    assert "torch.nn" not in (refusal(torch.nn.Linear(2, 2)) or "")
    assert "Linear" in (refusal(torch.nn.Linear(2, 2)) or "")


def test_window_is_the_shortest_reach_of_any_layer() -> None:
    assert window(llama()) is None
    assert window(mistral(sliding_window=10)) == 10


def test_a_layer_that_looks_less_far_than_a_sequence_is_never_given_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mistral(sliding_window=4)
    ids = torch.arange(1, 9)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]])
    with segment_attention(model), torch.no_grad():
        by_mask = forward_logits(model, ids, positions, None, apart((6, 2)))
        assert torch.equal(by_mask, model(input_ids=ids, position_ids=positions, use_cache=False).logits)
        monkeypatch.setattr("sideroad.kernels.causal_loss.window", lambda model: None)
        with pytest.raises(UnsupportedAttentionError, match="looks back over 4 tokens only, and a sequence has 6"):
            forward_logits(model, ids, positions, None, apart((6, 2)))


def test_lengths_that_do_not_fill_the_row_are_refused() -> None:
    model = llama()
    ids = torch.arange(1, 9)[None]
    with segment_attention(model), pytest.raises(UnsupportedAttentionError, match="one row of 7 tokens was expected"):
        forward_logits(model, ids, torch.arange(8)[None], None, apart((4, 3)))
