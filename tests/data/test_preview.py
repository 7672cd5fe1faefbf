from __future__ import annotations

import json
from pathlib import Path

import template_families as families
from hypothesis import given, settings
from hypothesis import strategies as st

from sideroad.data.config import DataConfig
from sideroad.data.dataset import load_data
from sideroad.data.encode import Encoded
from sideroad.data.preview import decode, preview, sample_of

TOKENIZER = families.family(families.CHATML)


@settings(max_examples=200)
@given(st.text(max_size=30), st.lists(st.booleans(), min_size=200, max_size=200))
def test_pieces_join_to_the_decoded_sequence(text: str, marks: list[bool]) -> None:
    ids = TOKENIZER(f"<|im_start|>{text}<|im_end|>", add_special_tokens=False)["input_ids"]
    encoded = Encoded(ids, (marks * 9)[: len(ids)], "t:1")
    sample = sample_of(encoded, TOKENIZER)
    assert "".join(piece for piece, _ in sample.runs) == decode(ids, TOKENIZER)
    assert all(piece for piece, _ in sample.runs)
    assert (sample.tokens, sample.trained_tokens) == (len(ids), sum(encoded.trained))


def test_a_character_split_between_runs_stays_whole() -> None:
    ids = TOKENIZER("a🦜b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    sample = sample_of(Encoded(ids, [False, False, False, True, True, True], "t:1"), TOKENIZER)
    assert sample.runs == (("a", False), ("🦜b", True))


def test_samples_show_what_is_trained(tmp_path: Path) -> None:
    rows = [{"prompt": f"a {n}", "completion": f"b {n}"} for n in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = load_data(DataConfig(train="t.jsonl"), TOKENIZER, root=tmp_path).train
    samples = preview(dataset, TOKENIZER, 4, seed=1)
    assert [sample.source for sample in samples] == [sample.source for sample in preview(dataset, TOKENIZER, 4, seed=1)]
    assert len({sample.source for sample in samples}) == 4
    assert [sample.source for sample in preview(dataset, TOKENIZER, 4, seed=2)] != [sample.source for sample in samples]
    assert len(preview(dataset, TOKENIZER, 50)) == 20
    number = int(samples[0].source.split(":")[1]) - 1
    assert samples[0].runs == (
        (f"<|im_start|>user\na {number}<|im_end|>\n<|im_start|>assistant\n", False),
        (f"b {number}<|im_end|>", True),
        ("\n", False),
    )
