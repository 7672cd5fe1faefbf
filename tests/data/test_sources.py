from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sideroad.data.sources import Source, read_source
from sideroad.errors import DataError

ROW = {"prompt": "a", "completion": "b"}
LINE = json.dumps(ROW)


def read(path: Path | str, root: Path = Path(), **options: Any) -> Source:
    return read_source(str(path), root=root, split=options.pop("split", "train"), **options)


def put(directory: Path, name: str, text: str) -> Path:
    (directory / name).write_text(text, encoding="utf-8")
    return directory / name


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.jsonl", f"{LINE}\n\n{LINE}\n", ["a.jsonl line 1", "a.jsonl line 3"]),
        ("a.ndjson", "\ufeff" + LINE, ["a.ndjson line 1"]),
        ("a.jsonl", json.dumps({"prompt": "a", "completion": "x\u2028y"}, ensure_ascii=False), ["a.jsonl line 1"]),
        ("a.json", f"[{LINE}, {LINE}]", ["a.json item 1", "a.json item 2"]),
        ("a.json", f'{{"data": [{LINE}]}}', ["a.json item 1"]),
        ("a.json", f"{LINE}\n{LINE}\n", ["a.json line 1", "a.json line 2"]),
        ("a.csv", 'prompt,completion\n"a\nb",c\n\nd,"e,""f"""\n', ["a.csv line 2", "a.csv line 5"]),
        ("a.tsv", "prompt\tcompletion\na\tb,c\n", ["a.tsv line 2"]),
        ("a.txt", "one\ntwo\n", ["a.txt"]),
    ],
)
def test_every_kind_of_file_knows_its_lines(tmp_path: Path, name: str, text: str, places: list[str]) -> None:
    path = put(tmp_path, name, text)
    source = read(name, tmp_path)
    assert [row.place for row in source.rows] == places
    assert source.files == {name: hashlib.sha256(path.read_bytes()).hexdigest()}
    if name != "a.txt":
        assert set(source.rows[0].values) == {"prompt", "completion"}


def test_csv_quoting(tmp_path: Path) -> None:
    put(tmp_path, "a.csv", 'prompt,completion\n"a\nb",c\n\nd,"e,""f"""\n')
    assert [dict(row.values) for row in read("a.csv", tmp_path).rows] == [
        {"prompt": "a\nb", "completion": "c"},
        {"prompt": "d", "completion": 'e,"f"'},
    ]


def test_parquet_and_gzip(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), tmp_path / "a.parquet")
    source = read("a.parquet", tmp_path)
    assert [row.source for row in source.rows] == ["a.parquet:1", "a.parquet:2"]
    assert source.rows[1].values == ROW
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    assert read("b.jsonl.gz", tmp_path).rows[0].place == "b.jsonl.gz line 1"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", "\n \n", "a.jsonl is empty"),
        ("a.jsonl", (LINE + "\n") * 6 + '{"prompt": "a", \n', "a.jsonl line 7: not JSON: "),
        ("a.jsonl", f"{LINE}\n[1, 2]\n", "a.jsonl line 2: must be an object with columns; found '[1, 2]'"),
        ("a.jsonl", f"{LINE}\n{{}}\n", "a.jsonl line 2: must be an object with columns"),
        ("a.json", f"[{LINE},\n  {{]", "a.json line 2: not JSON"),
        ("a.jsonl", "[" * 99999 + "]" * 99999, "a.jsonl line 1: not JSON: maximum recursion depth"),
        ("a.json", "[" * 99999 + "]" * 99999, "a.json: not JSON: maximum recursion depth"),
        ("a.json", f'[{{"prompt": {"9" * 5000}}}]', "a.json: not JSON: Exceeds the limit"),
        ("a.json", "3", "a.json: must be a list of objects; found int"),
        ("a.json", "[3]", "a.json item 1: must be an object"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv line 3: 1 cells, but the header names 2 columns"),
        ("a.csv", "prompt,prompt\na,b\n", "a.csv line 1: column names must be there and differ"),
        ("a.csv", 'prompt,completion\na,"b\n', "a.csv line 2: not valid CSV"),
        ("a.csv", "prompt,completion\n", "a.csv holds no rows"),
        ("a.parquet", "nope", "a.parquet: not a readable Parquet file"),
        ("a.docx", "nope", "a.docx: unknown kind of file. Readable: .jsonl,"),
        ("a.jsonl.gz", "nope", "cannot be read: Not a gzipped file"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, text: str, words: str) -> None:
    put(tmp_path, name, text)
    with pytest.raises(DataError) as caught:
        read(name, tmp_path)
    assert words in str(caught.value)


def test_broken_text_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE.encode() + b'\n{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"a.jsonl line 2: not UTF-8 \(byte 0xe9\)"):
        read("a.jsonl", tmp_path)


def test_the_first_twenty_problems_come_at_once(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "{\n" * 25)
    with pytest.raises(DataError) as caught:
        read("a.jsonl", tmp_path)
    text = str(caught.value)
    assert text.startswith("a.jsonl: 25 problems.")
    assert text.count("not JSON") == 20
    assert text.endswith("… and 5 more")


def test_a_missing_file_names_near_ones(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", LINE)
    with pytest.raises(
        DataError, match=r'no data at "trian.jsonl": there is no "trian.jsonl" in .*Did you mean \'train.jsonl\''
    ):
        read("trian.jsonl", tmp_path)
    with pytest.raises(DataError, match=r'there is no "quick" in .* It holds: train.jsonl'):
        read("quick/train.jsonl", tmp_path)


def test_a_directory_gives_each_split_its_own(tmp_path: Path) -> None:
    for name in (
        "train-0.jsonl",
        "train-1.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "LICENSE.txt",
        "SOURCE.md",
        ".hidden.jsonl",
    ):
        put(tmp_path, name, LINE)
    assert list(read(tmp_path).files) == ["train-0.jsonl", "train-1.jsonl"]
    assert list(read(tmp_path, split="validation").files) == ["validation.jsonl"]


def test_a_directory_without_split_names_is_taken_whole(tmp_path: Path) -> None:
    put(tmp_path, "b.jsonl", LINE)
    put(tmp_path, "a.csv", "prompt,completion\nx,y\n")
    assert [row.place for row in read(tmp_path).rows] == ["a.csv line 2", "b.jsonl line 1"]


def test_a_directory_without_data_lists_what_it_holds(tmp_path: Path) -> None:
    put(tmp_path, "test.jsonl", LINE)
    with pytest.raises(DataError, match=r"has no train files. It holds: test.jsonl. Readable: .jsonl"):
        read(tmp_path)


def test_a_directory_of_texts(tmp_path: Path) -> None:
    put(tmp_path, "one.txt", "a")
    put(tmp_path, "two.txt", "b")
    assert [row.values["text"] for row in read(tmp_path).rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/set", ("owner/set", None, "train")),
        ("hub:owner/set:test", ("owner/set", None, "test")),
        ("owner/set:main/validation", ("owner/set", "main", "validation")),
        ("hub:squad", ("squad", None, "train")),
    ],
)
def test_a_hub_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, expected: tuple[str, str | None, str]
) -> None:
    import datasets

    seen: list[Any] = []

    def load(name: str, config: str | None, *, split: str, download_config: Any) -> list[dict[str, str]]:
        seen.append((name, config, split, download_config.local_files_only))
        return [ROW]

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read(source, tmp_path, offline=True)
    assert seen == [(*expected, True)]
    assert found.rows[0].source == f"{expected[0]}:1"
    assert list(found.files) == [f"{expected[0]}:{expected[2]}"]


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError,
        match=r'"owner/set" is no file or directory here, and as a hub set \(split "train"\) it could not '
        r"be read offline: ConnectionError: no route",
    ):
        read("owner/set", tmp_path, offline=True)


def test_a_typo_below_an_existing_directory_is_no_hub_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    put(tmp_path / "data", "snips.jsonl", LINE)
    with pytest.raises(DataError, match=r'there is no "snip" in .*Did you mean \'snips.jsonl\''):
        read("data/snip", tmp_path)


def test_offline_lets_no_library_look_at_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub

    seen: list[tuple[bool, bool]] = []

    def load(*_: Any, **__: Any) -> list[dict[str, str]]:
        seen.append((datasets.config.HF_HUB_OFFLINE, huggingface_hub.is_offline_mode()))
        return [ROW]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    read("owner/set", tmp_path)
    read("owner/set", tmp_path, offline=True)
    monkeypatch.setenv("SIDEROAD_OFFLINE", "1")
    read("owner/set", tmp_path)
    assert seen == [(False, False), (True, True), (True, True)]
    assert (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE) == (False, False)


def test_a_damaged_gzip_file_is_said(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b"%d" % number**9 for number in range(999)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:40] + bytes(8) + packed[48:])
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read: Error -3 while decompressing"):
        read("a.jsonl.gz", tmp_path)


@pytest.mark.parametrize("name", ["link.jsonl", "pipe.jsonl"])
def test_a_broken_link_and_a_pipe_are_called_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=rf'no data at "{name}": it is a broken link, a pipe or a device'):
        read(name, tmp_path)


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "~nobody-of-this-name/x.jsonl"])
def test_a_path_that_cannot_be_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no data at"):
        read(name, tmp_path)
