"""rows() under generate(): each row says what it says alone, with beams, and with an encoder before the decoder."""

from __future__ import annotations

import pytest
import torch
from mixed import IDS, ROWS, four
from tiny import fill
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from sideroad.attaching import Attached, attach, attached
from sideroad.config import AdapterConfig
from sideroad.errors import AdapterError


@pytest.mark.parametrize("beams", [1, 2])
def test_generation(beams: int) -> None:
    handle = four()
    for name in handle.names:
        fill(handle, name, 0.4)
    check_generation(handle, IDS, beams)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_an_encoder_with_a_decoder(beams: int) -> None:
    torch.manual_seed(0)
    fields = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**fields, decoder_start_token_id=0)).eval()
    configs = {"a": "q", "b.2": ("q", "v"), "all": "all-linear", "apart": "wo"}
    for name, targets in configs.items():
        fill(attach(model, AdapterConfig(targets=targets), name), name, 0.4)
    handle = attached(model)
    assert handle is not None
    check_generation(handle, IDS, beams)


def check_generation(handle: Attached, ids: Tensor, beams: int) -> None:
    options = {"num_beams": beams, "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}

    def generate(rows: Tensor) -> Tensor:
        return handle.model.generate(rows, attention_mask=torch.ones_like(rows), **options)

    with handle.rows(ROWS, copies=beams):
        found = generate(ids)
    answers = {tuple(row.tolist()[-6:]) for row in found}
    assert len(answers) > 2, "the adapters must make a difference for this test to say something"
    for row, names in enumerate(ROWS):
        with handle.using(names or ()):
            assert torch.equal(found[row], generate(ids[row, None])[0])
    if beams > 1:
        words = r"is \[12, .*dim 0 must be the batch: 6. Name every row of the batch, and"
        with pytest.raises(AdapterError, match=words), handle.rows(ROWS):
            generate(ids)
